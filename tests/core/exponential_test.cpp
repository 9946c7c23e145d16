// SPDX-License-Identifier: Apache-2.0
#include "../reference/every_width.hpp"

#include <taskvec/core/exponential.hpp>
#include <taskvec/core/kernels.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

using namespace taskvec;

namespace {

struct exponential_of {
    template <int bytes>
    TASKVEC_INLINE pack<double, bytes> operator()(const pack<double, bytes>& x) const
    {
        return exponential(x);
    }
};
struct logarithm_of {
    template <int bytes>
    TASKVEC_INLINE pack<double, bytes> operator()(const pack<double, bytes>& x) const
    {
        return logarithm(x);
    }
};

/// out[i] = map(x[i]).
template <class Map>
struct map_kernel {
    const std::vector<double>& x;
    std::vector<double>& out;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        const double* const from = x.data();
        double* const to = out.data();
        constexpr std::size_t width = pack_lanes<double, bytes>;
        for (std::size_t i = 0; i + width <= x.size(); i += width) {
            kernels::store_row<double>(Map{}(kernels::load_wide<bytes>(from + i)), to + i);
        }
    }
};

/// The results at every width of packs, which must have the same bits.
template <class Map>
std::vector<double> at_every_width(const std::vector<double>& x)
{
    std::vector<double> scalar, out(x.size());
    testing::with_every_width(map_kernel<Map>{x, out}, [&](int bytes) {
        if (bytes == 0) { scalar = out; }
        CAPTURE(bytes);
        CHECK(std::memcmp(scalar.data(), out.data(), x.size() * sizeof(double)) == 0);
        out.assign(x.size(), -1.0);
    });
    return scalar;
}

double units_apart(double found, long double expected)
{
    const double nearest = static_cast<double>(expected);
    const double unit = std::nextafter(std::abs(nearest), std::numeric_limits<double>::infinity()) - std::abs(nearest);
    return static_cast<double>(std::abs(static_cast<long double>(found) - expected) / static_cast<long double>(unit));
}

} // namespace

TEST_CASE("e^x is within two units of the last place, at every width the same")
{
    std::mt19937_64 generator(1);
    std::vector<double> x;
    for (const double reach : {1e-12, 1e-3, 1.0, 40.0, 700.0}) {
        std::uniform_real_distribution<double> to(-reach, 0.0);
        for (int i = 0; i < 4000; ++i) { x.push_back(to(generator)); }
    }
    for (int i = 0; i < 4000; ++i) { x.push_back(-x[static_cast<std::size_t>(i) * 4]); }
    const auto y = at_every_width<exponential_of>(x);
    double worst = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        worst = std::max(worst, units_apart(y[i], std::exp(static_cast<long double>(x[i]))));
    }
    CAPTURE(worst);
    CHECK(worst <= 2);

    constexpr double infinity = std::numeric_limits<double>::infinity();
    const auto ends = at_every_width<exponential_of>({0.0, -0.0, -708.5, -1e300, -infinity, 1.0, -1.0, std::nan("")});
    CHECK(ends[0] == 1);
    CHECK(ends[1] == 1);
    CHECK(ends[2] == 0);
    CHECK(ends[3] == 0);
    CHECK(ends[4] == 0);
    CHECK(ends[5] == doctest::Approx(2.7182818284590452).epsilon(1e-15));
    CHECK(ends[6] == doctest::Approx(0.36787944117144233).epsilon(1e-15));
    CHECK(std::isnan(ends[7]));
}

TEST_CASE("ln x is within two units of the last place, beside 1 within 2^-53, at every width the same")
{
    std::mt19937_64 generator(2);
    std::vector<double> x;
    for (const double reach : {1e-9, 0.3, 18.0, 700.0}) {
        std::uniform_real_distribution<double> to(-reach, reach);
        for (int i = 0; i < 4000; ++i) { x.push_back(std::exp(to(generator))); }
    }
    const auto y = at_every_width<logarithm_of>(x);
    double worst = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const long double expected = std::log(static_cast<long double>(x[i]));
        if (std::abs(static_cast<long double>(y[i]) - expected) > 0x1p-53L) {
            worst = std::max(worst, units_apart(y[i], expected));
        }
    }
    CAPTURE(worst);
    CHECK(worst <= 2);

    const auto some = at_every_width<logarithm_of>(
        {1.0, 2.0, 0.5, 1e-8, 1e8, 0x1.6a09e667f3bcdp-1, 0x1p-1022, 0x1.fffffffffffffp1023});
    CHECK(some[0] == 0);
    CHECK(some[1] == 0x1.62e42fefa39efp-1);
    CHECK(some[2] == -0x1.62e42fefa39efp-1);
    CHECK(some[3] == doctest::Approx(-18.420680743952367).epsilon(1e-15));
    CHECK(some[4] == doctest::Approx(18.420680743952367).epsilon(1e-15));
    CHECK(some[5] == doctest::Approx(-0.34657359027997264).epsilon(1e-15));
    CHECK(some[6] == doctest::Approx(-708.39641853226408).epsilon(1e-15));
    CHECK(some[7] == doctest::Approx(709.78271289338397).epsilon(1e-15));
}
