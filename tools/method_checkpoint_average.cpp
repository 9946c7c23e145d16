// --method checkpoint-average.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/checkpoint_average.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::checkpoint_average_options> checkpoint_average("checkpoint-average",
    "mean of the checkpoints of one training run, the oldest first, by --schedule ({schedule}); needs no --base", 12,
    {.needs_base = false, .without_weights = "--schedule says what a checkpoint weighs; leave the weight out"});

} // namespace
