// The directory of a zip archive whose entries are stored as they are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/by_name.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/formats/file_kind.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// A zip archive's directory, each entry checked: where its bytes lie, stored as they are.
class zip_directory {
public:
    struct entry {
        std::string_view name;
        std::uint64_t offset = 0, size = 0;
        bool stored = true; ///< neither compressed nor encrypted
    };

    zip_directory(std::string_view bytes, std::string_view file)
        : bytes_(bytes)
        , file_(file)
    {
        read();
    }
    [[nodiscard]] const std::vector<entry>& entries() const noexcept { return entries_; }
    /// The entry of that name, or nullptr.
    [[nodiscard]] const entry* find(std::string_view name) const { return detail::find_by_name(entries_, name); }
    [[nodiscard]] std::string_view content(const entry& one) const
    {
        return bytes_.substr(static_cast<std::size_t>(one.offset), static_cast<std::size_t>(one.size));
    }

private:
    [[noreturn]] void fail(const std::string& what, std::uint64_t at) const
    {
        raise<format_error>(error_code::archive_damaged,
            message("is a damaged PyTorch file (a zip archive): ", what, ": ", fetch_again), std::string(file_), at);
    }
    /// A little-endian number; the place must lie inside the file.
    template <class T>
    [[nodiscard]] T number(std::uint64_t at) const
    {
        if (at > bytes_.size() || bytes_.size() - at < sizeof(T)) { fail("a record runs past its end", at); }
        T value;
        std::memcpy(&value, bytes_.data() + at, sizeof value);
        return value;
    }
    [[nodiscard]] std::string_view text(std::uint64_t at, std::uint64_t size) const
    {
        if (at > bytes_.size() || bytes_.size() - at < size) { fail("a record runs past its end", at); }
        return bytes_.substr(static_cast<std::size_t>(at), static_cast<std::size_t>(size));
    }

    void read()
    {
        constexpr std::uint32_t end_mark = 0x06054b50, end64_mark = 0x06064b50, locator_mark = 0x07064b50,
                                entry_mark = 0x02014b50;
        constexpr std::uint64_t end_size = 22, locator_size = 20;
        std::uint64_t end = bytes_.size();
        for (std::uint64_t comment = 0; comment <= 65535 && comment + end_size <= bytes_.size(); ++comment) {
            const std::uint64_t at = bytes_.size() - end_size - comment;
            if (number<std::uint32_t>(at) == end_mark && number<std::uint16_t>(at + 20) == comment) {
                end = at;
                break;
            }
        }
        if (end == bytes_.size()) { fail("its directory, at its end, is missing", end); }
        std::uint64_t count = number<std::uint16_t>(end + 10), size = number<std::uint32_t>(end + 12),
                      begin = number<std::uint32_t>(end + 16), limit = end;
        if (end >= locator_size && number<std::uint32_t>(end - locator_size) == locator_mark) {
            const auto at = number<std::uint64_t>(end - locator_size + 8);
            if (number<std::uint32_t>(at) != end64_mark) { fail("its 64-bit directory is not where it should be", at); }
            count = number<std::uint64_t>(at + 32);
            size = number<std::uint64_t>(at + 40);
            begin = number<std::uint64_t>(at + 48);
            limit = at;
        }
        if (begin > limit || size > limit - begin) { fail("its directory runs past its end", begin); }
        std::uint64_t at = begin;
        for (std::uint64_t i = 0; i < count; ++i) {
            if (begin + size - at < 46 || number<std::uint32_t>(at) != entry_mark) {
                fail(message("its directory promises ", count, " entries and has ", i), at);
            }
            at = read_entry(at, begin);
            if (at > begin + size) { fail("its directory runs past its end", at); }
        }
        std::sort(entries_.begin(), entries_.end(), [](const entry& a, const entry& b) { return a.name < b.name; });
        for (std::size_t i = 1; i < entries_.size(); ++i) {
            if (entries_[i].name == entries_[i - 1].name) {
                fail(message("'", entries_[i].name, "' occurs twice"), entries_[i].offset);
            }
        }
        auto places = entries_;
        std::sort(places.begin(), places.end(), [](const entry& a, const entry& b) { return a.offset < b.offset; });
        for (std::size_t i = 1; i < places.size(); ++i) {
            if (places[i - 1].size > places[i].offset - places[i - 1].offset) {
                fail(message("'", places[i - 1].name, "' and '", places[i].name, "' share bytes"), places[i].offset);
            }
        }
    }
    /// Reads the entry of the directory at `at`; returns where the next one begins. Entries lie before `begin`.
    [[nodiscard]] std::uint64_t read_entry(std::uint64_t at, std::uint64_t begin)
    {
        constexpr std::uint32_t local_mark = 0x04034b50, wide = 0xffffffff;
        const auto flags = number<std::uint16_t>(at + 8), method = number<std::uint16_t>(at + 10);
        const std::uint64_t name_size = number<std::uint16_t>(at + 28), extra_size = number<std::uint16_t>(at + 30),
                            comment_size = number<std::uint16_t>(at + 32);
        std::uint64_t packed = number<std::uint32_t>(at + 20), size = number<std::uint32_t>(at + 24),
                      local = number<std::uint32_t>(at + 42);
        entry one;
        one.name = text(at + 46, name_size);
        const std::uint64_t extra_end = at + 46 + name_size + extra_size;
        (void)text(at + 46 + name_size, extra_size);
        for (std::uint64_t field = at + 46 + name_size; extra_end - field >= 4;) {
            const auto id = number<std::uint16_t>(field), length = number<std::uint16_t>(field + 2);
            if (length > extra_end - field - 4) { break; }
            std::uint64_t place = field + 4;
            const std::uint64_t field_end = place + length;
            for (auto* value : {&size, &packed, &local}) {
                if (id == 1 && *value == wide && field_end - place >= 8) {
                    *value = number<std::uint64_t>(place);
                    place += 8;
                }
            }
            field = field_end;
        }
        if (local > begin || begin - local < 30 || number<std::uint32_t>(local) != local_mark) {
            fail(message("'", one.name, "' is not where the directory says"), local);
        }
        const std::uint64_t here = number<std::uint16_t>(local + 26);
        one.offset = local + 30 + here + number<std::uint16_t>(local + 28);
        if (here != name_size || text(local + 30, here) != one.name) {
            fail(message("'", one.name, "' has another name where it lies"), local);
        }
        one.stored = method == 0 && (flags & 1u) == 0;
        one.size = one.stored ? size : packed;
        if (one.stored && packed != size) { fail(message("'", one.name, "' has two sizes"), at); }
        if (one.offset > begin || one.size > begin - one.offset) {
            fail(message("'", one.name, "' runs past the end"), one.offset);
        }
        entries_.push_back(one);
        return extra_end + comment_size;
    }

    std::string_view bytes_, file_;
    std::vector<entry> entries_;
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
