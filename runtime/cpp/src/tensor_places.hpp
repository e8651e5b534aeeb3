// Where an ONNX file says its tensors lie.
//
// A tensor of an ONNX file may name a file, an offset and a length in place of its values, and
// ONNX Runtime has followed names that leave the folder, and addresses in the process's own memory.
// So the file is walked before ONNX Runtime sees it, in the wire format of protocol buffers, by the
// field numbers of onnx.proto.
#pragma once

#include <string>
#include <vector>

#include "files.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// Refuse an ONNX file, called `file` in messages, whose tensors lie anywhere but in it or, within
/// their lengths, in the files `beside` it. Throws BundleError.
void check_tensor_places(const Bytes& content, const std::string& file,
                         const std::vector<FileEntry>& beside);

}  // namespace sam3rt
