// TIES on taskvec::gpu.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/methods/election.hpp>
#include <taskvec/device/select/top_k.hpp>

#include <cstddef>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

template <>
class detail::device_merger<ties_options> {
public:
    static constexpr bool needs_base = true, in_place = false;

    device_merger(device_models& models, const ties_options& options)
        : election_(models, options)
        , thresholds_(thresholds_on_device(models, options.density, options.scope, options.trim))
        , on_device_(models.policy(), models.models(), thresholds_)
    {
        models.check_finite(); // the selection has read everything but what it kept whole, and has waited
    }
    void write(device_models& models, merge_report& report)
    {
        election_.write(models, report, [&]<class A>(std::type_identity<A>, std::size_t tensor) {
            return elementwise::keep_top<A>{on_device_.get<A>(tensor)};
        });
    }
    [[nodiscard]] unsigned walks() const noexcept { return thresholds_.walks(); }

private:
    device_election election_;
    trim_thresholds thresholds_;
    device_thresholds on_device_;
};

} // namespace taskvec::inline TASKVEC_ABI
