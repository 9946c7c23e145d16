// Every merge method that runs on taskvec::gpu. For nvcc, or for g++ and clang with THRUST_DEVICE_SYSTEM set to a host
// system. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/methods/dare.hpp>
#include <taskvec/device/methods/fisher.hpp>
#include <taskvec/device/methods/linear.hpp>
#include <taskvec/device/methods/merge.hpp>
#include <taskvec/device/methods/streamed.hpp>
#include <taskvec/device/methods/ties.hpp>
