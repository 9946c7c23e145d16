// Any bytes are a PyTorch file or refused, and tensors lie within the file.
// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"

#include <taskvec/formats/pytorch.hpp>

TASKVEC_FUZZ_TARGET(pytorch)
{
    const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
    fuzz::read([&] {
        const auto contents = taskvec::parse_pytorch(bytes, "fuzzed");
        for (const auto& entry : contents.header.entries) {
            fuzz::expect(entry.offset <= size && entry.bytes <= size - entry.offset, "a tensor outside the file");
        }
    });
}
