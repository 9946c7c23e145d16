// containers/xtensor.hpp: where xtensor 0.26 has the header, over the one of 0.24.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xtensor/xtensor.hpp>
