// Everything that runs on taskvec::gpu. For nvcc, or for g++ and clang with THRUST_DEVICE_SYSTEM set to a host system.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/arithmetic/gpu.hpp>
#include <taskvec/backend/thrust/system.hpp>
#include <taskvec/lowrank/gpu.hpp>
#include <taskvec/merge/device_regmean.hpp>
#include <taskvec/merge/gpu.hpp>
#include <taskvec/reuse/gpu.hpp>
#include <taskvec/reuse/streamed.hpp>
#include <taskvec/select/gpu.hpp>
