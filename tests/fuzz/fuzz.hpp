// A target for libFuzzer, which is also a test: TASKVEC_FUZZ_TARGET(name) { … } is given `data` and `size`. Built by
// scripts/fuzz it is what libFuzzer calls; in the suite it is a test case that goes through the inputs in
// tests/fuzz/corpus/<name>. A target ends the process where something is wrong: expect() says what.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(TASKVEC_FUZZ)
#include <doctest/doctest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <vector>
#endif

namespace fuzz {

inline void expect(bool right, const char* what)
{
    if (right) { return; }
    std::fprintf(stderr, "wrong: %s\n", what);
    std::abort();
}

/// Calls a reader, which may refuse its input by an error of the library and by nothing else.
template <class F>
void read(F&& reader)
{
    try {
        reader();
    }
    catch (const taskvec::error& refused) {
        expect(*refused.what() != 0, "an error without words");
    }
}

/// A file in memory, for readers that take paths.
class memory_file {
public:
    explicit memory_file(std::string_view content)
        : file_(::memfd_create("fuzz", MFD_CLOEXEC))
        , path_("/proc/self/fd/" + std::to_string(file_))
    {
        expect(file_ >= 0 && ::write(file_, content.data(), content.size()) == static_cast<ssize_t>(content.size()),
            "no file in memory");
    }
    memory_file(const memory_file&) = delete;
    memory_file& operator=(const memory_file&) = delete;
    ~memory_file() { ::close(file_); }
    [[nodiscard]] const std::string& path() const { return path_; }

private:
    int file_;
    std::string path_;
};

/// A directory whose files are written over, for readers that take directories.
class directory {
public:
    explicit directory(std::filesystem::path place)
        : path_(std::move(place))
    {
        std::filesystem::create_directories(path_);
    }
    directory(const directory&) = delete;
    directory& operator=(const directory&) = delete;
    ~directory()
    {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    void put(const char* name, std::string_view content) const
    {
        const int file = ::open((path_ / name).c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        expect(file >= 0 && ::write(file, content.data(), content.size()) == static_cast<ssize_t>(content.size()),
            "no file");
        ::close(file);
    }
    [[nodiscard]] const std::filesystem::path& path() const { return path_; }

private:
    std::filesystem::path path_;
};

/// Numbers from an input, 0 once it has ended.
class numbers {
public:
    numbers(const std::uint8_t* data, std::size_t size)
        : rest_(data, size)
    { }
    std::uint8_t byte()
    {
        if (rest_.empty()) { return 0; }
        const auto value = rest_[0];
        rest_ = rest_.subspan(1);
        return value;
    }
    /// From 0 to below `end`.
    std::size_t below(std::size_t end)
    {
        const std::size_t high = byte();
        return (high * 256 + byte()) % end;
    }

private:
    std::span<const std::uint8_t> rest_;
};

#if !defined(TASKVEC_FUZZ)
/// Goes through a corpus; returns how many inputs it has.
inline std::size_t replay(const char* name, void (*target)(const std::uint8_t*, std::size_t))
{
    std::vector<std::filesystem::path> inputs;
    for (const auto& entry :
        std::filesystem::directory_iterator(TASKVEC_TEST_DIR "/fuzz/corpus/" + std::string(name))) {
        inputs.push_back(entry.path());
    }
    std::sort(inputs.begin(), inputs.end());
    for (const auto& input : inputs) {
        std::ifstream file(input, std::ios::binary);
        const std::string content((std::istreambuf_iterator<char>(file)), {});
        target(reinterpret_cast<const std::uint8_t*>(content.data()), content.size());
    }
    return inputs.size();
}
#endif

} // namespace fuzz

#if defined(TASKVEC_FUZZ)
#define TASKVEC_FUZZ_TARGET(name)                                                                                      \
    static void name##_target(const std::uint8_t* data, std::size_t size);                                             \
    extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)                                  \
    {                                                                                                                  \
        name##_target(data, size);                                                                                     \
        return 0;                                                                                                      \
    }                                                                                                                  \
    static void name##_target(const std::uint8_t* data, std::size_t size)
#else
#define TASKVEC_FUZZ_TARGET(name)                                                                                      \
    static void name##_target(const std::uint8_t* data, std::size_t size);                                             \
    TEST_CASE("the corpus of " #name " is read or refused")                                                            \
    {                                                                                                                  \
        CHECK(fuzz::replay(#name, name##_target) > 0);                                                                 \
    }                                                                                                                  \
    static void name##_target(const std::uint8_t* data, std::size_t size)
#endif
