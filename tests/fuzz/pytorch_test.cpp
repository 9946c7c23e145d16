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
            const auto strides = contents.strides.find(entry.name);
            auto extent = entry.bytes;
            if (strides != contents.strides.end()) { // up to its last element, which may be several elements of it
                std::uint64_t last = 0;
                for (std::size_t d = 0; d < entry.shape.size(); ++d) {
                    last += static_cast<std::uint64_t>((entry.shape[d] - 1) * strides->second[d]);
                }
                extent = (last + 1) * taskvec::bits_per_element(entry.dtype) / 8;
            }
            fuzz::expect(entry.offset <= size && extent <= size - entry.offset, "a tensor outside the file");
        }
    });
}
