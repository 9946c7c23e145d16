// What merge() says of calls that are none of its own: one sentence, that names the argument and the mend.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/policy.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/methods/method.hpp>
#include <taskvec/models/aligned_models.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <ranges>
#include <span>
#include <string_view>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI::detail {

/// The argument lists of merge() on the CPU, without policy and options: one concept for each form.
template <class Models, class Sink>
concept merges_aligned = std::convertible_to<Models, const aligned_models&> && std::convertible_to<Sink, tensor_sink&>;
template <class Tasks, class Out>
concept merges_models =
    std::convertible_to<Tasks, std::span<const const_model_ref>> && std::convertible_to<Out, const model_ref&>;
template <class Tasks, class Out>
concept merges_views = tasks_of<std::remove_cvref_t<Tasks>, cpu> && output_of<Out, cpu>;
template <class Base>
concept base_model = std::convertible_to<Base, const const_model_ref&>;
template <class Base>
concept base_view = input_of<std::remove_cvref_t<Base>, cpu>;
template <class How>
concept merge_setting = std::convertible_to<How, const model_options&>;

/// Whether merge(policy, options, arguments…) is one of those that there are.
template <class Options, class... Arguments>
inline constexpr bool right_merge = false;
template <class Options, class A, class B>
inline constexpr bool right_merge<Options, A, B> =
    merges_aligned<A, B> || (!method<Options>::needs_base && (merges_views<A, B> || merges_models<A, B>));
template <class Options, class A, class B, class C>
inline constexpr bool right_merge<Options, A, B, C> =
    (base_view<A> && merges_views<B, C>) || (base_model<A> && merges_models<B, C>)
    || (merge_setting<C> && right_merge<Options, A, B> && !merges_aligned<A, B>);
template <class Options, class A, class B, class C, class D>
inline constexpr bool right_merge<Options, A, B, C, D> = merge_setting<D> && right_merge<Options, A, B, C>;

/// A list of models, of views, or of what is nearly a view.
template <class X>
concept list_like = std::ranges::input_range<const std::remove_cvref_t<X>> && !viewable<const std::remove_cvref_t<X>>
    && !std::is_arithmetic_v<std::remove_cvref_t<std::ranges::range_reference_t<const std::remove_cvref_t<X>>>>;

/// Text, such as the name of a file.
template <class X>
concept text_like = std::convertible_to<const std::remove_cvref_t<X>&, std::string_view>;
/// The address of a model.
template <class X>
concept address_of_model = std::is_pointer_v<std::remove_cvref_t<X>>
    && std::convertible_to<const std::remove_pointer_t<std::remove_cvref_t<X>>&, const_model_ref>;

/// Says what is wrong with a base.
template <class Base>
consteval void check_merge_base()
{
    constexpr bool read = !text_like<Base>, here = !address_of_model<Base>, one = !list_like<Base>;
    static_assert(read,
        "merge(): the base is text: where it names a file, open that first (taskvec/formats), and pass its model");
    static_assert(here, "merge(): the base is the address of a model: pass the model itself");
    static_assert(
        one || !read, "merge(): a list stands where the base is expected: merge(policy, options, base, tasks, output)");
    constexpr view_flaw flaw = read && here && one ? flaw_of<Base, memory_space::host>() : view_flaw::none;
    static_assert(flaw != view_flaw::pointer,
        "merge(): the base is a pointer, which does not say how long it is: pass "
        "taskvec::host_view<const float>(pointer, size)");
    static_assert(flaw != view_flaw::elements,
        "merge(): the elements of the base are of no storage type: expected double, float, taskvec::bf16 or "
        "taskvec::f16");
    static_assert(flaw != view_flaw::space,
        "merge(): the base lies in device memory, and the policy is taskvec::cpu: merge with taskvec::gpu, or copy it");
    static_assert(flaw != view_flaw::no_view,
        "merge(): the base is nothing that has a flat view: pass a vector, an array or a span of numbers, or a "
        "taskvec::const_model_ref (Eigen, xtensor and others: include their header of taskvec/interop)");
}

/// Says what is wrong with a list of tasks.
template <class Tasks>
consteval void check_merge_tasks()
{
    using bare = std::remove_cvref_t<Tasks>;
    static_assert(!std::is_pointer_v<bare>,
        "merge(): the tasks are a pointer: pass a list of views, such as "
        "std::vector<taskvec::host_view<const float>>");
    if constexpr (!std::is_pointer_v<bare>) {
        static_assert(list_like<bare>,
            "merge(): the tasks are one vector, or none: pass a list with a vector for each task, such as "
            "std::array tasks{taskvec::as_view(task)}");
        if constexpr (list_like<bare>) {
            constexpr view_flaw flaw = flaw_of<std::ranges::range_reference_t<const bare>, memory_space::host>();
            static_assert(flaw != view_flaw::pointer,
                "merge(): the tasks are pointers, which do not say how long they are: pass a list of "
                "taskvec::host_view<const float>(pointer, size)");
            static_assert(flaw != view_flaw::elements,
                "merge(): the elements of the tasks are of no storage type: expected double, float, taskvec::bf16 or "
                "taskvec::f16");
            static_assert(flaw != view_flaw::space,
                "merge(): the tasks lie in device memory, and the policy is taskvec::cpu: merge with taskvec::gpu, or "
                "copy them");
            static_assert(flaw != view_flaw::no_view,
                "merge(): a task is nothing that has a flat view: pass a list of vectors, arrays or spans of numbers, "
                "beside a base and an output of that kind (Eigen, xtensor and others: include their header of "
                "taskvec/interop)");
        }
    }
}

/// Says what is wrong with an output.
template <class Out>
consteval void check_merge_output()
{
    constexpr view_flaw flaw = flaw_of<Out, memory_space::host>();
    static_assert(flaw != view_flaw::pointer,
        "merge(): the output is a pointer, which does not say how long it is: pass "
        "taskvec::host_view<float>(pointer, size)");
    static_assert(flaw != view_flaw::elements,
        "merge(): the elements of the output are of no storage type: expected double, float, taskvec::bf16 or "
        "taskvec::f16");
    static_assert(flaw != view_flaw::space,
        "merge(): the output lies in device memory, and the policy is taskvec::cpu: merge with taskvec::gpu, or copy "
        "it");
    static_assert(flaw != view_flaw::no_view,
        "merge(): the output is nothing that has a flat view: pass a vector, an array or a span of numbers, or a "
        "taskvec::model_ref");
    if constexpr (flaw == view_flaw::none) {
        static_assert(!std::is_const_v<typename view_of<std::remove_reference_t<Out>>::element_type>,
            "merge(): the output is const: pass memory that can be written");
        static_assert(outlives_the_expression<Out>,
            "merge(): the output is a temporary, and the result would be lost with it: name it first");
    }
}

template <class Base, class Tasks, class Out>
consteval void check_flat_merge()
{
    if constexpr (!base_view<Base>) { check_merge_base<Base>(); }
    else if constexpr (!tasks_of<std::remove_cvref_t<Tasks>, cpu>) {
        check_merge_tasks<Tasks>();
    }
    else {
        check_merge_output<Out>();
    }
}

template <class Base, class Tasks, class Out>
consteval void check_model_merge()
{
    static_assert(!base_model<Tasks>,
        "merge(): the tasks are one model: pass a list with a model for each task, such as "
        "std::vector<taskvec::const_model_ref> tasks{task}");
    if constexpr (!base_model<Tasks>) {
        static_assert(std::convertible_to<Tasks, std::span<const const_model_ref>>,
            "merge(): the base is a model, and the tasks are no list of models: pass "
            "std::vector<taskvec::const_model_ref>");
        static_assert(!std::convertible_to<Tasks, std::span<const const_model_ref>> || !base_model<Out>
                || std::convertible_to<Out, const model_ref&>,
            "merge(): the output is a model of const tensors: pass a taskvec::model_ref, over memory that can be "
            "written");
        static_assert(!std::convertible_to<Tasks, std::span<const const_model_ref>> || base_model<Out>,
            "merge(): the base is a model, and the output is none: pass a taskvec::model_ref");
    }
}

/// Says what is wrong with the arguments of merge() after the options.
template <class Options, class... Arguments>
struct merge_arguments {
    static consteval void check()
    {
        static_assert(sizeof...(Arguments) == 0 && sizeof...(Arguments) > 0,
            "merge(): expected (policy, options, base, tasks, output), with a taskvec::model_options after them where "
            "it is wanted, or (policy, options, aligned models, sink)");
    }
};
template <class Options, class Tasks, class Out>
struct merge_arguments<Options, Tasks, Out> {
    static consteval void check()
    {
        constexpr bool forgotten = method<Options>::needs_base && list_like<Tasks>;
        static_assert(!forgotten,
            "merge(): this method needs the base of its tasks: merge(policy, options, base, tasks, output)");
        if constexpr (!forgotten) {
            if constexpr (method<Options>::needs_base) { merge_arguments<Options>::check(); }
            else if constexpr (tasks_of<std::remove_cvref_t<Tasks>, cpu>) {
                check_merge_output<Out>();
            }
            else if constexpr (std::convertible_to<Tasks, std::span<const const_model_ref>>) {
                check_model_merge<const_model_ref, Tasks, Out>();
            }
            else {
                check_merge_tasks<Tasks>();
            }
        }
    }
};
template <class Options, class Base, class Tasks, class Out>
struct merge_arguments<Options, Base, Tasks, Out> {
    static consteval void check()
    {
        if constexpr (merge_setting<Out> && !list_like<Tasks>) { merge_arguments<Options, Base, Tasks>::check(); }
        else if constexpr (base_model<Base>) {
            check_model_merge<Base, Tasks, Out>();
        }
        else {
            check_flat_merge<Base, Tasks, Out>();
        }
    }
};
template <class Options, class Base, class Tasks, class Out, class How>
struct merge_arguments<Options, Base, Tasks, Out, How> {
    static consteval void check()
    {
        static_assert(merge_setting<How>, "merge(): what comes after the output is a taskvec::model_options");
        if constexpr (merge_setting<How>) { merge_arguments<Options, Base, Tasks, Out>::check(); }
    }
};

/// What empty braces hold in place of tasks.
struct no_task { };

/// Braces with tasks of several types.
struct mixed_tasks {
    template <list_entry First, list_entry... Rest>
        requires(!(std::same_as<First, Rest> && ...))
    mixed_tasks(const First&, const Rest&...)
    { }
};

/// Whether tasks of a type in braces can be merged; says why not.
template <class Task>
consteval bool merges_in_braces()
{
    constexpr bool some = !std::same_as<Task, no_task>;
    static_assert(some, "merge(): no task was given: the braces of the tasks are empty");
    constexpr bool right = !owns_elements<Task> && (viewable<const Task> || std::same_as<Task, const_model_ref>);
    static_assert(right || !some,
        "merge(): tasks in braces would be copied, or are of no one type: pass views, {taskvec::as_view(a), "
        "taskvec::as_view(b)}, or name a list of them");
    return right;
}

} // namespace taskvec::inline TASKVEC_ABI::detail
