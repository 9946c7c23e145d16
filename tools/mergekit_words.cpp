// mergekit's words for methods and dtypes, one row for each.
// SPDX-License-Identifier: Apache-2.0
#include "mergekit_words.hpp"

namespace tool {

const std::vector<mergekit_method>& mergekit_methods()
{
    using kind = mergekit_parameter::kind;
    using scope = mergekit_parameter::scope;
    using base = mergekit_method::base;
    static const std::vector<mergekit_method> list = [] {
        const mergekit_parameter weight{"weight", "weight", kind::number, scope::tasks, true};
        const mergekit_parameter weight_of_all{"weight", "weight", kind::number, scope::input, true};
        const mergekit_parameter lambda{"lambda", "lambda"};
        const mergekit_parameter density{.name = "density", .row = "density", .of = scope::tasks, .unless = "1"};
        const mergekit_parameter gamma{.name = "gamma", .row = "gamma", .of = scope::tasks};
        const mergekit_parameter divided{.name = "normalize", .row = "normalize-weights", .type = kind::truth};
        const mergekit_parameter averaged{
            .name = "normalize", .row = "merge-weights", .type = kind::truth, .on = "mean", .off = "sum"};
        const mergekit_parameter rescale{.name = "rescale", .row = "rescale", .type = kind::truth};
        const mergekit_parameter rescale_drawn{
            .name = "rescale", .row = "rescale-by", .type = kind::truth, .on = "l1", .off = "none"};
        const mergekit_parameter t{.name = "t", .row = "t", .required = true};
        const mergekit_parameter epsilon{.name = "epsilon", .row = "epsilon"};
        const mergekit_parameter spread{.name = "epsilon", .row = "epsilon", .of = scope::tasks};
        return std::vector<mergekit_method>{
            {"linear", "average", base::input,
                {weight_of_all, {.name = "normalize", .row = "normalized", .type = kind::truth}}},
            {"task_arithmetic", "task-arithmetic", base::required, {weight, lambda, divided}, true},
            {"ties", "ties", base::required, {weight, density, lambda, averaged, rescale}, true},
            {"dare_ties", "dare-ties", base::required, {weight, density, lambda, averaged, rescale_drawn}, true},
            {"dare_linear", "dare", base::required, {weight, density, lambda, divided, rescale_drawn}, true},
            {"breadcrumbs", "breadcrumbs", base::required, {weight, density, gamma, lambda, divided, rescale}, true},
            {"breadcrumbs_ties", "breadcrumbs-ties", base::required,
                {weight, density, gamma, lambda, averaged, rescale}, true},
            {"della", "della", base::required, {weight, density, spread, lambda, averaged, rescale_drawn}, true},
            {"della_linear", "della-linear", base::required, {weight, density, spread, lambda, divided, rescale_drawn},
                true},
            {.theirs = "arcee_fusion", .ours = "arcee-fusion", .most = 1},
            {.theirs = "slerp", .ours = "slerp", .parameters = {t}, .most = 1},
            {"nuslerp", "nuslerp", base::optional,
                {weight,
                    {.name = "nuslerp_row_wise",
                        .row = "angles-between",
                        .type = kind::truth,
                        .on = "columns",
                        .off = "rows",
                        .unless = "rows"},
                    {.name = "nuslerp_flatten",
                        .row = "angles-between",
                        .type = kind::truth,
                        .on = "tensors",
                        .off = "",
                        .unless = "tensors"}}, // the last that is set counts
                false, 2, 2},
            {"multislerp", "multi-slerp", base::optional,
                {weight, {.name = "normalize_weights", .row = "normalized", .type = kind::truth}}},
            {"karcher", "karcher", base::input,
                {{.name = "max_iter", .row = "steps", .type = kind::whole_number},
                    {.name = "tol", .row = "tolerance"}}},
            {"model_stock", "model-stock", base::required,
                {{.name = "filter_wise", .row = "angles-between", .type = kind::truth, .on = "rows", .off = "tensors"}},
                false, 2},
            {.theirs = "nearswap", .ours = "nearswap", .parameters = {t}, .most = 1},
            {"sce", "sce", base::required, {{.name = "select_topk", .row = "density"}}, true},
            {"ram", "ram", base::required, {epsilon}},
            {"ramplus_tl", "ram-plus", base::required,
                {epsilon, {.name = "r", .row = "r"}, {.name = "alpha", .row = "alpha"}}, true},
            {"passthrough", "passthrough", base::input, {{.name = "scale", .row = "scale", .of = scope::input}}, false,
                1, 1}};
    }();
    return list;
}

const std::vector<mergekit_dtype>& mergekit_dtypes()
{
    static const std::vector<mergekit_dtype> list{
        {"float32", "f32"}, {"bfloat16", "bf16"}, {"float16", "f16"}, {"float64", "f64"}};
    return list;
}

} // namespace tool
