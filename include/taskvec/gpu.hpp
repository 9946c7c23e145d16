// Everything that runs on taskvec::gpu. For nvcc, or for g++ and clang with THRUST_DEVICE_SYSTEM set to a host system.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/arithmetic.hpp>
#include <taskvec/device/linalg.hpp>
#include <taskvec/device/methods.hpp>
#include <taskvec/device/methods/regmean.hpp>
#include <taskvec/device/reuse.hpp>
#include <taskvec/device/reuse/streamed.hpp>
#include <taskvec/device/select.hpp>
#include <taskvec/device/thrust/system.hpp>
