// A folder of its own for each test, and small helpers to write and read files in it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#if defined(_WIN32)
#include <process.h>
#else
#include <stdlib.h>
#endif

class scratch {
public:
    scratch()
    {
#if defined(_WIN32)
        static unsigned counter = 0;
        const auto folder = std::filesystem::temp_directory_path() / ("taskvec-test-" + std::to_string(::_getpid()));
        do {
            path_ = folder;
            path_ += "-" + std::to_string(counter++);
        } while (!std::filesystem::create_directory(path_));
#else
        std::string pattern = (std::filesystem::temp_directory_path() / "taskvec-test-XXXXXX").string();
        path_ = ::mkdtemp(pattern.data());
#endif
    }
    scratch(const scratch&) = delete;
    scratch& operator=(const scratch&) = delete;
    ~scratch()
    {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
    const std::filesystem::path& path() const { return path_; }
    /// The names of what is in the folder.
    std::set<std::string> names() const { return names_in(path_); }
    static std::set<std::string> names_in(const std::filesystem::path& folder)
    {
        std::set<std::string> result;
        for (const auto& entry : std::filesystem::directory_iterator(folder)) {
            result.insert(entry.path().filename().string());
        }
        return result;
    }

private:
    std::filesystem::path path_;
};

inline void spill(const std::filesystem::path& path, const std::string& content)
{
    std::ofstream(path, std::ios::binary) << content;
}
inline std::string slurp(const std::filesystem::path& path)
{
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

/// The bytes of a safetensors file with this header and data.
inline std::string safetensors_bytes(const std::string& header, const std::string& data = {})
{
    const std::uint64_t length = header.size();
    std::string result(8, '\0');
    std::memcpy(result.data(), &length, 8);
    return result + header + data;
}
