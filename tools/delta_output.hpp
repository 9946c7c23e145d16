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
        models_ = models.options().on_nonfinite == taskvec::nonfinite::error
                && models.options().on_overflow != taskvec::overflow::propagate
            ? &models
            : nullptr;
        writer_.begin(models, kept);
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const float* values, std::size_t n) override
    {
        check(tensor, indices, values, n);
        writer_.write(tensor, first, from, to, indices, values, n);
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const double* values, std::size_t n) override
    {
        check(tensor, indices, values, n);
        writer_.write(tensor, first, from, to, indices, values, n);
    }
    [[nodiscard]] taskvec::delta_writer& writer() { return writer_; }

private:
    /// Models that are finite may differ by more than their arithmetic holds.
    template <class T>
    void check(std::size_t tensor, const std::uint64_t* indices, const T* values, std::size_t n) const
    {
        for (std::size_t i = 0; models_ && i < n; ++i) {
            if (std::isfinite(values[i])) { continue; }
            taskvec::raise<taskvec::nonfinite_error>(taskvec::error_code::result_overflow,
                taskvec::message("tensor '", models_->tensors()[tensor].name, "' differs by infinity at index ",
                    indices[i], " though both models are finite there: their difference is beyond ",
                    sizeof(T) == 4 ? "F32" : "F64", "; --overflow propagate lets it pass"));
        }
    }

    taskvec::delta_writer writer_;
    const taskvec::aligned_models* models_ = nullptr; ///< whose values are to be finite; null: none
};

} // namespace tool
