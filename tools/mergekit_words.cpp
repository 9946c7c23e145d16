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
            {.theirs = "ties",
                .ours = "ties",
                .parameters = {weight, density, lambda, averaged, rescale},
                .semantics = true,
                .walks = 4},
            {.theirs = "dare_ties",
                .ours = "dare-ties",
                .parameters = {weight, density, lambda, averaged, rescale_drawn},
                .semantics = true,
                .walks = 3},
            {.theirs = "dare_linear",
                .ours = "dare",
                .parameters = {weight, density, lambda, divided, rescale_drawn},
                .semantics = true,
                .walks = 2},
            {.theirs = "breadcrumbs",
                .ours = "breadcrumbs",
                .parameters = {weight, density, gamma, lambda, divided, rescale},
                .semantics = true,
                .walks = 4},
            {.theirs = "breadcrumbs_ties",
                .ours = "breadcrumbs-ties",
                .parameters = {weight, density, gamma, lambda, averaged, rescale},
                .semantics = true,
                .walks = 5},
            {.theirs = "della",
                .ours = "della",
                .parameters = {weight, density, spread, lambda, averaged, rescale_drawn},
                .semantics = true,
                .walks = 3},
            {.theirs = "della_linear",
                .ours = "della-linear",
                .parameters = {weight, density, spread, lambda, divided, rescale_drawn},
                .semantics = true,
                .walks = 2},
            {.theirs = "arcee_fusion", .ours = "arcee-fusion", .most = 1, .walks = 2},
            {.theirs = "slerp", .ours = "slerp", .parameters = {t}, .most = 1, .walks = 2},
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
                false, 2, 2, 2},
            {"multislerp", "multi-slerp", base::optional,
                {weight, {.name = "normalize_weights", .row = "normalized", .type = kind::truth}}, false, 1, 1000, 2},
            {"karcher", "karcher", base::input,
                {{.name = "max_iter", .row = "steps", .type = kind::whole_number}, {.name = "tol", .row = "tolerance"}},
                false, 1, 1000, 2},
            {"model_stock", "model-stock", base::required,
                {{.name = "filter_wise", .row = "angles-between", .type = kind::truth, .on = "rows", .off = "tensors"}},
                false, 2, 1000, 2},
            {.theirs = "nearswap", .ours = "nearswap", .parameters = {t}, .most = 1},
            {.theirs = "sce",
                .ours = "sce",
                .parameters = {{.name = "select_topk", .row = "density"}},
                .semantics = true,
                .walks = 3},
            {.theirs = "ram", .ours = "ram", .parameters = {epsilon}},
            {.theirs = "ramplus_tl",
                .ours = "ram-plus",
                .parameters = {epsilon, {.name = "r", .row = "r"}, {.name = "alpha", .row = "alpha"}},
                .semantics = true,
                .walks = 2},
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
