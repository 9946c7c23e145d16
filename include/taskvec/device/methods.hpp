// Every merge method that runs on taskvec::gpu. For nvcc, or for g++ and clang with THRUST_DEVICE_SYSTEM set to a host
// system.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <taskvec/device/methods/merge.hpp>
#include <taskvec/device/methods/streamed.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/fisher.hpp>
#include <taskvec/methods/model_stock.hpp>
#include <taskvec/methods/slerp.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>
