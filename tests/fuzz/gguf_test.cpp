// Any bytes are a GGUF file or refused, its tensors lie within it, and what is an adapter has whole pairs.
// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"

#include <taskvec/formats/adapter_convert.hpp>

TASKVEC_FUZZ_TARGET(gguf)
{
    const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
    fuzz::read([&] {
        const auto header = taskvec::parse_gguf(bytes, "fuzzed");
        for (const auto& entry : header.tensors.entries) {
            fuzz::expect(entry.offset <= size && entry.bytes <= size - entry.offset, "a tensor outside the file");
        }
        const fuzz::memory_file file(std::string_view(reinterpret_cast<const char*>(data), size));
        auto adapter = taskvec::read_gguf_adapter<float>(file.path());
        for (const auto& [name, made] : adapter.modules) {
            fuzz::expect(made.update.a.rows() == made.update.b.cols(), "factors of two ranks");
        }
        (void)taskvec::converted_adapter(adapter, taskvec::adapter_dialect::gguf);
        taskvec::unpair_rows(adapter, 2, 1);
        (void)taskvec::converted_adapter(adapter, taskvec::adapter_dialect::peft);
    });
}
