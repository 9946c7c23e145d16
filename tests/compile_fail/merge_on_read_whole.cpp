// A method that writes whole tensors, asked for what merge_on_read() works out a piece at a time.
// SPDX-License-Identifier: Apache-2.0
// error: merges_on_read
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/merge_on_read.hpp>
#include <taskvec/methods/regmean.hpp>

int main()
{
    using namespace taskvec;
    const std::vector<const_model_ref> tasks(1);
    const aligned_models models(nullptr, tasks);
    const_model_ref merged;
#ifdef TASKVEC_FAULT
    (void)merge_on_read(cpu{}, regmean_options{}, models, merged);
#else
    (void)merge_on_read(cpu{}, average_options{}, models, merged);
#endif
}
