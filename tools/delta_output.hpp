// A delta that is being written by a verb.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "runner.hpp"

#include <taskvec/formats/delta.hpp>
#include <taskvec/select/sparse.hpp>

#include <utility>

namespace tool {

/// delta_writer, with its temporary file known to whoever must remove it.
class delta_output final : public taskvec::sparse_sink {
public:
    delta_output(const fs::path& path, std::uint64_t fingerprint)
        : writer_(path, fingerprint)
    { }
    void begin(const taskvec::aligned_models& models, const std::vector<std::uint64_t>& kept) override
    {
        writer_.begin(models, kept);
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const float* values, std::size_t n) override
    {
        writer_.write(tensor, first, from, to, indices, values, n);
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const double* values, std::size_t n) override
    {
        writer_.write(tensor, first, from, to, indices, values, n);
    }
    [[nodiscard]] taskvec::delta_writer& writer() { return writer_; }

private:
    taskvec::delta_writer writer_;
};

} // namespace tool
