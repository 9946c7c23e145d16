// PERU-LoRA is of one adapter: a list is one too many.
// SPDX-License-Identifier: Apache-2.0
// error: the arguments are not those of peru_lora\(policy, adapter
// lines: 40
#include <taskvec/reuse/peru_lora.hpp>

#include <vector>

auto f(const std::vector<taskvec::lora_adapter<float>>& adapters, const taskvec::peru_lora_options& options)
{
#if defined(TASKVEC_FAULT)
    return taskvec::peru_lora(taskvec::cpu{}, adapters, options);
#else
    return taskvec::peru_lora(taskvec::cpu{}, adapters[0], options);
#endif
}
