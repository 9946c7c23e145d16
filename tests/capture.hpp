// CAPTURE for what a structured binding names: no lambda, as CAPTURE makes one, can capture that before clang 16.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <doctest/doctest.h>

#define CAPTURE_BOUND(name)                                                                                            \
    const auto& captured_##name = name;                                                                                \
    INFO(#name " := ", captured_##name)
