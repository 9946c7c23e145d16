// --method model-stock.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include <taskvec/methods/model_stock.hpp>

namespace {

const tool::register_method<taskvec::model_stock_options> model_stock("model-stock",
    "base + what the angles between the task vectors say of their mean, tensor by tensor", 90,
    {.without_weights = "it takes the plain mean; leave the weight out",
        .check = [](const tool::merge_request& request) {
            if (request.tasks.size() < 2) {
                throw tool::usage_error(
                    "--method model-stock compares fine-tuned models with each other: give two or more tasks");
            }
        }});

} // namespace
