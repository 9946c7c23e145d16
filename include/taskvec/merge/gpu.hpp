// Every merge method that runs on taskvec::gpu. For nvcc, or for g++ and clang with THRUST_DEVICE_SYSTEM set to a host system.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/merge/device_dare.hpp>
#include <taskvec/merge/device_fisher.hpp>
#include <taskvec/merge/device_linear.hpp>
#include <taskvec/merge/device_merge.hpp>
#include <taskvec/merge/device_ties.hpp>
#include <taskvec/merge/streamed.hpp>
