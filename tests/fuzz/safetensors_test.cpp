// Any bytes are a safetensors file or refused, and tensors lie within the file.
// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"

#include <taskvec/formats/safetensors.hpp>

TASKVEC_FUZZ_TARGET(safetensors)
{
    const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
    fuzz::read([&] {
        const auto header = taskvec::parse_safetensors(bytes, "fuzzed");
        for (const auto& entry : header.entries) {
            fuzz::expect(entry.offset <= size && entry.bytes <= size - entry.offset, "a tensor outside the file");
        }
    });
}
