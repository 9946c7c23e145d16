// The factors of an update are views into it: those of a temporary are gone before they are read.
// SPDX-License-Identifier: Apache-2.0
// error: its views would dangle
#include <taskvec/adapters/lora.hpp>

double f(const taskvec::lora_update<float>& update)
{
#if defined(TASKVEC_FAULT)
    const auto pair = taskvec::lora_update<float>(update).factors();
#else
    const auto pair = update.factors();
#endif
    return pair.weight;
}
