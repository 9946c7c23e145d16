// Any configuration, a zero byte, and any file of tensors are an adapter or refused, by both readers.
// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"

#include <taskvec/formats/adapter_file.hpp>
#include <taskvec/formats/peft.hpp>

#include <filesystem>

namespace {

/// A directory whose two files are written over.
struct adapter_directory {
    std::filesystem::path path;
    adapter_directory()
        : path(std::filesystem::temp_directory_path() / ("taskvec-fuzz-" + std::to_string(::getpid())))
    {
        std::filesystem::create_directory(path);
    }
    ~adapter_directory()
    {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    void put(const char* name, std::string_view content) const
    {
        const int file = ::open((path / name).c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        fuzz::expect(file >= 0 && ::write(file, content.data(), content.size()) == static_cast<ssize_t>(content.size()),
            "no file");
        ::close(file);
    }
};

} // namespace

TASKVEC_FUZZ_TARGET(adapter)
{
    static const adapter_directory directory;
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const auto end = std::min(text.find('\0'), size);
    directory.put("adapter_config.json", text.substr(0, end));
    directory.put("adapter_model.safetensors", text.substr(std::min(end + 1, size)));
    fuzz::read([&] {
        const auto adapter = taskvec::read_peft<float>(directory.path, {.whole_modules = true});
        for (const auto& [name, update] : adapter.updates) {
            fuzz::expect(update.a.rows() == update.b.cols(), "factors of two ranks");
        }
    });
    fuzz::read([&] { (void)taskvec::read_adapter<float>(directory.path); });
}
