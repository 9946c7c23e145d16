// Any bytes are a delta or refused, and a file of statistics or refused; entries lie within their tensors.
// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"

#include <taskvec/formats/delta.hpp>
#include <taskvec/formats/statistics.hpp>

TASKVEC_FUZZ_TARGET(delta)
{
    const fuzz::memory_file file(std::string_view(reinterpret_cast<const char*>(data), size));
    fuzz::read([&] {
        const taskvec::delta_file opened(file.path());
        const auto whole = taskvec::read_delta(file.path());
        fuzz::expect(whole.tensors.size() == opened.parts().size(), "tensors that are not all read");
        std::uint64_t kept = 0;
        for (const auto& [name, tensor] : whole.tensors) {
            std::visit(
                [&](const auto& sparse) {
                    std::uint64_t next = 0;
                    const auto end = taskvec::element_count(sparse.shape);
                    for (const auto index : sparse.indices) {
                        fuzz::expect(index >= next && index < end, "an entry outside its tensor");
                        next = index + 1;
                    }
                    fuzz::expect(sparse.values.size() == sparse.kept(), "values without places");
                    kept += sparse.kept();
                },
                tensor);
        }
        fuzz::expect(kept == opened.kept(), "other entries than were counted");
    });
    fuzz::read([&] {
        const taskvec::statistics_file opened(file.path());
        for (const auto& [name, tensor] : opened.model()) { (void)opened.layout(name); }
    });
}
