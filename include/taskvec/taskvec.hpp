// Everything that needs only the standard library and Eigen.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/backend/linalg.hpp>
#include <taskvec/backend/parallel.hpp>
#include <taskvec/core/config.hpp>
#include <taskvec/core/dtype.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/hash.hpp>
#include <taskvec/core/matrix.hpp>
#include <taskvec/core/policy.hpp>
#include <taskvec/core/random.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/core/view.hpp>
#include <taskvec/jvp/attention.hpp>
#include <taskvec/jvp/dual.hpp>
#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/embedding.hpp>
#include <taskvec/jvp/jvp.hpp>
#include <taskvec/jvp/linear.hpp>
#include <taskvec/jvp/linearize.hpp>
#include <taskvec/jvp/linearized_lora.hpp>
#include <taskvec/jvp/lora_layer.hpp>
#include <taskvec/jvp/loss.hpp>
#include <taskvec/jvp/normalization.hpp>
#include <taskvec/jvp/parameters.hpp>
#include <taskvec/jvp/primal_tangent.hpp>
#include <taskvec/lowrank/factored_svd.hpp>
#include <taskvec/lowrank/randomized_svd.hpp>
#include <taskvec/lowrank/svd.hpp>
