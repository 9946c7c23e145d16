// Any configuration, a zero byte, and any file of tensors are an adapter or refused, by both readers.
// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"

#include <taskvec/formats/adapter_file.hpp>
#include <taskvec/formats/peft.hpp>

#include <filesystem>

TASKVEC_FUZZ_TARGET(adapter)
{
    static const fuzz::directory directory(
        std::filesystem::temp_directory_path() / ("taskvec-fuzz-" + std::to_string(::getpid())));
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const auto end = std::min(text.find('\0'), size);
    directory.put("adapter_config.json", text.substr(0, end));
    directory.put("adapter_model.safetensors", text.substr(std::min(end + 1, size)));
    fuzz::read([&] {
        const auto adapter = taskvec::read_peft<float>(directory.path(), {.whole_modules = true});
        for (const auto& [name, update] : adapter.updates) {
            fuzz::expect(update.a.rows() == update.b.cols(), "factors of two ranks");
        }
    });
    fuzz::read([&] { (void)taskvec::read_adapter<float>(directory.path()); });
}
