// A list of flat indices that takes four bytes for each where the tensor allows it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <compare>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory_resource>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Flat indices, read as 64-bit numbers and held in 32 bits each until one of them needs more (those of a tensor of at
/// most 2^32 elements never do). The list does not order or check them. Copies take their memory from the default
/// resource, as all std::pmr containers do; a move keeps it.
///
///     index_list indices{3, 15};
///     for (const std::uint64_t index : indices) { … }
class index_list {
public:
    using value_type = std::uint64_t;
    /// Of the memory that holds the words.
    using allocator_type = std::pmr::polymorphic_allocator<std::byte>;

    index_list() = default;
    /// Empty, with memory from `memory`.
    explicit index_list(const allocator_type& memory)
        : narrow_(memory)
        , wide_(memory)
    { }
    /// `count` zeros, with room for the indices of a tensor of `elements` elements.
    index_list(std::size_t count, std::uint64_t elements, const allocator_type& memory = {})
        : index_list(memory)
    {
        is_wide_ = elements > 0 && elements - 1 > most;
        is_wide_ ? wide_.resize(count) : narrow_.resize(count);
    }
    index_list(std::initializer_list<std::uint64_t> indices, const allocator_type& memory = {})
        : index_list(memory)
    {
        for (const std::uint64_t index : indices) { push_back(index); }
    }

    [[nodiscard]] std::size_t size() const noexcept { return is_wide_ ? wide_.size() : narrow_.size(); }
    [[nodiscard]] bool empty() const noexcept { return size() == 0; }
    [[nodiscard]] std::uint64_t operator[](std::size_t i) const noexcept { return is_wide_ ? wide_[i] : narrow_[i]; }
    /// The last index; the list is not empty.
    [[nodiscard]] std::uint64_t back() const noexcept { return (*this)[size() - 1]; }
    /// True where an index takes eight bytes.
    [[nodiscard]] bool wide() const noexcept { return is_wide_; }
    /// The words: std::uint32_t, or std::uint64_t where wide().
    [[nodiscard]] const void* data() const noexcept
    {
        return is_wide_ ? static_cast<const void*>(wide_.data()) : static_cast<const void*>(narrow_.data());
    }

    /// Room for `count` indices, without another allocation, of the width that the list has now.
    void reserve(std::size_t count) { is_wide_ ? wide_.reserve(count) : narrow_.reserve(count); }
    /// Appends an index; the first that needs more than 32 bits widens the list.
    void push_back(std::uint64_t index)
    {
        if (!is_wide_ && index > most) {
            wide_.reserve(narrow_.capacity());
            wide_.assign(narrow_.begin(), narrow_.end());
            narrow_.clear();
            narrow_.shrink_to_fit();
            is_wide_ = true;
        }
        is_wide_ ? wide_.push_back(index) : narrow_.push_back(static_cast<std::uint32_t>(index));
    }
    /// Replaces `n` indices from number `first` on, which fit the width that the list has. Disjoint runs may be stored
    /// from several threads at once.
    void store(std::size_t first, const std::uint64_t* indices, std::size_t n) noexcept
    {
        for (std::size_t i = 0; i < n; ++i) {
            if (is_wide_) { wide_[first + i] = indices[i]; }
            else {
                narrow_[first + i] = static_cast<std::uint32_t>(indices[i]);
            }
        }
    }

    /// Goes through the indices, as numbers: random access, whose reference is a value.
    class iterator {
    public:
        using iterator_category = std::input_iterator_tag;
        using iterator_concept = std::random_access_iterator_tag;
        using value_type = std::uint64_t;
        using difference_type = std::ptrdiff_t;
        using pointer = void;
        using reference = std::uint64_t;

        iterator() = default;
        /// At place `at` of a list, which it refers to.
        iterator(const index_list& list, std::size_t at) noexcept
            : list_(&list)
            , at_(at)
        { }
        [[nodiscard]] std::uint64_t operator*() const noexcept { return (*list_)[at_]; }
        [[nodiscard]] std::uint64_t operator[](std::ptrdiff_t n) const noexcept { return *(*this + n); }
        iterator& operator++() noexcept { return *this += 1; }
        iterator& operator--() noexcept { return *this -= 1; }
        iterator operator++(int) noexcept
        {
            const iterator before = *this;
            ++*this;
            return before;
        }
        iterator operator--(int) noexcept
        {
            const iterator before = *this;
            --*this;
            return before;
        }
        /// n places on, or back.
        iterator& operator+=(std::ptrdiff_t n) noexcept
        {
            at_ += static_cast<std::size_t>(n);
            return *this;
        }
        /// n places back.
        iterator& operator-=(std::ptrdiff_t n) noexcept { return *this += -n; }
        /// n places on.
        friend iterator operator+(iterator i, std::ptrdiff_t n) noexcept { return i += n; }
        /// n places on.
        friend iterator operator+(std::ptrdiff_t n, iterator i) noexcept { return i += n; }
        /// n places back.
        friend iterator operator-(iterator i, std::ptrdiff_t n) noexcept { return i -= n; }
        /// How many places a is behind b.
        friend std::ptrdiff_t operator-(const iterator& a, const iterator& b) noexcept
        {
            return static_cast<std::ptrdiff_t>(a.at_) - static_cast<std::ptrdiff_t>(b.at_);
        }
        friend bool operator==(const iterator& a, const iterator& b) noexcept { return a.at_ == b.at_; }
        friend auto operator<=>(const iterator& a, const iterator& b) noexcept { return a.at_ <=> b.at_; }

    private:
        const index_list* list_ = nullptr;
        std::size_t at_ = 0;
    };
    [[nodiscard]] iterator begin() const noexcept { return {*this, 0}; }
    [[nodiscard]] iterator end() const noexcept { return {*this, size()}; }

    /// The same indices, whatever they are held in.
    friend bool operator==(const index_list& a, const index_list& b) noexcept
    {
        if (a.size() != b.size()) { return false; }
        for (std::size_t i = 0; i < a.size(); ++i) {
            if (a[i] != b[i]) { return false; }
        }
        return true;
    }

private:
    static constexpr std::uint64_t most = std::numeric_limits<std::uint32_t>::max();

    std::pmr::vector<std::uint32_t> narrow_{};
    std::pmr::vector<std::uint64_t> wide_{};
    bool is_wide_ = false;
};

} // namespace taskvec::inline TASKVEC_ABI
