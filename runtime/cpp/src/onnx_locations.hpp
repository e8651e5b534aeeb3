// What an ONNX file may hold, and where it may say that its tensors lie.
//
// A tensor of an ONNX file may name a file, an offset and a length in place of its values, and
// ONNX Runtime has followed names that leave the folder, and addresses in the process's own memory.
// So this library walks the file before ONNX Runtime sees it, in the wire format of protocol
// buffers, by the field numbers of onnx.proto. Two readers of one file may disagree where the file
// is unusual (overlong numbers, unknown fields, subgraphs), so everything unusual is refused.
#pragma once

#include <string>
#include <vector>

#include "files.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// Refuse an ONNX file, called `file` in messages, that holds fields or operators other than those
/// of exported graphs, or whose tensors lie anywhere but in it or, within their lengths, in the
/// files `beside` it. Throws BundleError.
void check_onnx(ByteView content, const std::string& file, const std::vector<FileEntry>& beside);

/// Refuse a wrapper that is anything but one EPContext node that names the engine file beside it.
/// ONNX Runtime would run whatever a wrapper holds or names. Throws BundleError.
void check_wrapper(ByteView content, const std::string& file, const std::string& engine);

}  // namespace sam3rt
