// Exact top-k by magnitude on the gpu policy by a radix select: what device_top_k.hpp is held to, and falls back on.
// SPDX-License-Identifier: Apache-2.0
//
// The bits of the k-th magnitude are found eleven at a time: a pass counts, for every task vector at once, how the
// entries that share the bits found so far go on. Three passes for f32 (six for f64) whatever the data are; one more
// counts the equals in each block of 4096 elements, so that the place where the kept ones end can be found in one
// block.
#pragma once

#include <taskvec/device/models/device_models.hpp>
#include <taskvec/device/select/magnitude_functors.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// The blocks of block_size elements of a range of tensors: what is counted for each (equals, entries that are kept) is
/// found again in one.
class equal_blocks {
public:
    equal_blocks(const aligned_models& models, tensor_range range)
        : range_(range)
    {
        for (std::size_t i = range.first; i < range.last; ++i) {
            first_.push_back(count_);
            count_ += (models.tensors()[i].size + block_size - 1) / block_size;
        }
        first_.push_back(count_);
    }
    [[nodiscard]] std::uint64_t count() const noexcept { return count_; }
    [[nodiscard]] std::uint64_t first(std::size_t tensor) const noexcept { return first_[tensor - range_.first]; }

    /// *place = that of the wanted-th entry of a task vector whose magnitude is `magnitude`; equal[b] entries of block
    /// b are. Queued.
    template <arithmetic_element A>
    void find(device_models& models, std::size_t task, bits_type<A> magnitude, std::uint64_t wanted,
        const elementwise::counter* equal, elementwise::counter* place) const
    {
        std::uint64_t block = 0;
        while (equal[block] < wanted) { wanted -= equal[block++]; }
        const auto after = std::upper_bound(first_.begin(), first_.end(), block);
        const std::size_t tensor = range_.first + static_cast<std::size_t>(after - first_.begin()) - 1;
        const aligned_tensor& of = models.models().tensors()[tensor];
        const std::uint64_t offset = (block - *(after - 1)) * block_size,
                            size = std::min<std::uint64_t>(block_size, of.size - offset);
        models.read_part(tensor, offset, size, [&](const gpu& policy, std::size_t, const device_piece& piece) {
            visit_arithmetic(of, [&]<class B>(std::type_identity<B>) {
                if constexpr (sizeof(B) <= sizeof(A)) {
                    const std::uint64_t begin = offset - piece.offset;
                    device::sweep(policy, 1,
                        elementwise::nth_equal<A, B>{piece, task, magnitude, begin, begin + size, wanted, place});
                }
            });
        });
    }

private:
    tensor_range range_;
    std::uint64_t count_ = 0;
    std::vector<std::uint64_t> first_; // of each tensor of the range, and one more
};

/// Finds thresholds over a range of tensors.
template <arithmetic_element A>
class device_radix_search {
    using bits = bits_type<A>;
    static constexpr unsigned magnitude_width = 8 * sizeof(A) - 1;

    struct channel {
        std::uint64_t k = 0, above = 0;
        elementwise::magnitude_prefix<A> found{};
    };

public:
    device_radix_search(device_models& models, tensor_range range)
        : models_(models)
        , range_(range)
        , blocks_(models.models(), range)
    {
        for (std::size_t i = range.first; i < range.last; ++i) { elements_ += models.models().tensors()[i].size; }
    }

    /// counts[t] of task vector t are kept. `walks`: how often the data were read.
    [[nodiscard]] std::vector<top_k_threshold<A>> run(std::span<const std::uint64_t> counts, unsigned* walks)
    {
        bool any = false;
        for (const std::uint64_t k : counts) {
            channels_.push_back({k, 0, {0, k < elements_}}); // otherwise everything is kept
            any = any || k < elements_;
        }
        unsigned passes = 0;
        for (unsigned left = magnitude_width; any && left > 0; ++passes) {
            const unsigned width = std::min(elementwise::histogram_bits, left);
            left -= width;
            narrow(left, width);
        }
        std::vector<top_k_threshold<A>> thresholds(channels_.size());
        if (any) {
            find_ends(thresholds);
            ++passes;
        }
        if (walks) { *walks = passes; }
        return thresholds;
    }

private:
    [[nodiscard]] device::buffer<elementwise::magnitude_prefix<A>> upload() const
    {
        std::vector<elementwise::magnitude_prefix<A>> wanted;
        for (const channel& c : channels_) { wanted.push_back(c.found); }
        return {models_.policy(), wanted};
    }
    template <class Use>
    void read(const Use& use)
    {
        models_.read(range_, [&](const gpu& policy, std::size_t tensor, const device_piece& piece) {
            visit_arithmetic(models_.models().tensors()[tensor], [&]<class B>(std::type_identity<B> type) {
                if constexpr (sizeof(B) <= sizeof(A)) {
                    use(policy, tensor, piece, type);
                } // f64 tensors compare in f64
            });
        });
    }

    /// Finds `width` more bits, those above `shift`, of every answer.
    void narrow(unsigned shift, unsigned width)
    {
        constexpr std::size_t copies = 32;
        const std::size_t size = channels_.size() * elementwise::histogram_bins;
        const auto wanted = upload();
        device::buffer<elementwise::counter> bins(models_.policy(), copies * size);
        bins.clear();
        read([&]<class B>(const gpu& policy, std::size_t, const device_piece& piece, std::type_identity<B>) {
            device::sweep(policy, piece.size,
                elementwise::magnitude_histogram<A, B>{
                    piece, wanted.data(), shift, width, bins.data(), copies, models_.nonfinite_flag()});
        });
        device::sweep(models_.policy(), size, elementwise::add_copies{bins.data(), size, copies});
        std::vector<elementwise::counter> counts(size);
        device::download(models_.policy(), counts.data(), bins.data(), size * sizeof(counts[0]));
        for (std::size_t t = 0; t < channels_.size(); ++t) {
            channel& c = channels_[t];
            if (!c.found.active) { continue; }
            const elementwise::counter* const mine = counts.data() + t * elementwise::histogram_bins;
            std::size_t bin = std::size_t{1} << width;
            while (bin-- > 1 && c.k > c.above + mine[bin]) { c.above += mine[bin]; }
            c.found.prefix = static_cast<bits>(c.found.prefix << width | static_cast<bits>(bin));
        }
    }

    /// The answers are known: finds the places where the kept equals end.
    void find_ends(std::vector<top_k_threshold<A>>& thresholds)
    {
        const std::size_t tasks = channels_.size();
        const auto wanted = upload();
        device::buffer<elementwise::counter> counts(models_.policy(), tasks * blocks_.count()),
            places(models_.policy(), tasks);
        counts.clear();
        places.clear();
        read([&]<class B>(const gpu& policy, std::size_t tensor, const device_piece& piece, std::type_identity<B>) {
            device::sweep(policy, piece.size,
                elementwise::equal_counts<A, B>{piece, wanted.data(), counts.data(), blocks_.count(),
                    blocks_.first(tensor), models_.nonfinite_flag()});
        });
        const std::vector<elementwise::counter> equal = counts.download();
        for (std::size_t t = 0; t < tasks; ++t) {
            const channel& c = channels_[t];
            if (!c.found.active) { continue; }
            blocks_.find<A>(
                models_, t, c.found.prefix, c.k - c.above, equal.data() + t * blocks_.count(), places.data() + t);
        }
        const std::vector<elementwise::counter> last = places.download();
        for (std::size_t t = 0; t < tasks; ++t) {
            if (channels_[t].found.active) { thresholds[t] = {channels_[t].found.prefix, last[t] + 1}; }
        }
    }

    device_models& models_;
    tensor_range range_;
    equal_blocks blocks_;
    std::uint64_t elements_ = 0;
    std::vector<channel> channels_;
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
