// What the tensors of models say that a configuration does not.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "config_models.hpp"

namespace tool::configuration {

/// Looks at the files of a document's models, once all of it is read: buffers that one model has and another lacks take
/// no part, and without a dtype the result has one that holds the numbers of all models, as for mergekit, where one
/// does. Notes both.
void look_at_tensors(reading& it);

} // namespace tool::configuration
