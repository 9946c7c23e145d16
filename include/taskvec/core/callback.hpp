// Functions as values: callback owns what it calls, function_ref refers to it. What std::function is for, without the
// tenth of a second that <functional> costs in every file.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <concepts>
#include <cstddef>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// A function of this signature, owned: a lambda, a function, a std::function. Empty at first, and where it is made of
/// a null pointer or of an empty std::function; an empty one must not be called. A copy copies what is called.
///
///     callback<bool(std::string_view)> wanted = [](std::string_view name) { return name != "bias"; };
///     if (wanted && wanted("weight")) { … }
template <class Signature>
class callback;

/// A function of this signature that somebody else owns and keeps until the last call: for parameters.
///
///     void repeat(std::size_t times, function_ref<void(std::size_t)> body);
///     repeat(3, [&](std::size_t i) { sum += i; });
template <class Signature>
class function_ref;

template <class R, class... A>
class callback<R(A...)> {
public:
    callback() noexcept = default;
    callback(std::nullptr_t) noexcept { }
    template <class F>
        requires(!std::same_as<std::remove_cvref_t<F>, callback> && std::is_invocable_r_v<R, std::decay_t<F>&, A...>)
    callback(F&& f)
    {
        using target = std::decay_t<F>;
        if constexpr (std::is_pointer_v<std::remove_cvref_t<F>> || requires { f.operator bool(); }) {
            if (!static_cast<bool>(f)) { return; }
        }
        target_ = new target(std::forward<F>(f));
        kind_ = &kind_of<target>;
    }
    callback(const callback& other)
        : target_(other.kind_ ? other.kind_->copy(other.target_) : nullptr)
        , kind_(other.kind_)
    { }
    callback(callback&& other) noexcept
        : target_(std::exchange(other.target_, nullptr))
        , kind_(std::exchange(other.kind_, nullptr))
    { }
    callback& operator=(callback other) noexcept
    {
        std::swap(target_, other.target_);
        std::swap(kind_, other.kind_);
        return *this;
    }
    ~callback()
    {
        if (kind_) { kind_->destroy(target_); }
    }

    [[nodiscard]] explicit operator bool() const noexcept { return kind_ != nullptr; }
    R operator()(A... arguments) const { return kind_->call(target_, std::forward<A>(arguments)...); }

private:
    struct kind {
        R (*call)(void*, A...);
        void* (*copy)(const void*);
        void (*destroy)(void*) noexcept;
    };
    template <class F>
    static constexpr kind kind_of{
        [](void* target, A... arguments) -> R { return (*static_cast<F*>(target))(std::forward<A>(arguments)...); },
        [](const void* target) -> void* { return new F(*static_cast<const F*>(target)); },
        [](void* target) noexcept { delete static_cast<F*>(target); }};

    void* target_ = nullptr;
    const kind* kind_ = nullptr;
};

template <class R, class... A>
class function_ref<R(A...)> {
public:
    template <class F>
        requires(!std::same_as<std::remove_cvref_t<F>, function_ref> && std::is_object_v<std::remove_reference_t<F>>
                    && std::is_invocable_r_v<R, F&, A...>)
    function_ref(F&& f) noexcept
        : target_(const_cast<void*>(static_cast<const volatile void*>(&f)))
        , call_([](void* target, A... arguments) -> R {
            return (*static_cast<std::remove_reference_t<F>*>(target))(std::forward<A>(arguments)...);
        })
    { }

    R operator()(A... arguments) const { return call_(target_, std::forward<A>(arguments)...); }

private:
    void* target_;
    R (*call_)(void*, A...);
};

} // namespace taskvec::inline TASKVEC_ABI
