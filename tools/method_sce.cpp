// --method sce.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/sce.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::sce_options> sce(
    "sce", "select the --density ({density}) that varies most, weigh tasks by their squares, erase minority signs", 93);

} // namespace
