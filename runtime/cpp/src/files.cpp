#include "files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <random>
#include <system_error>

#include "sha256.hpp"

namespace sam3rt {
namespace {

[[noreturn]] void fail(int code, const std::filesystem::path& path) {
    throw std::system_error(code, std::generic_category(), path.string());
}

/// A file descriptor that is closed with its scope.
class Descriptor {
public:
    /// Errors name `path`, which may be another one than what is opened.
    Descriptor(const std::filesystem::path& path, int flags)
        : Descriptor(path, path, flags) {}
    Descriptor(const std::filesystem::path& path, const std::filesystem::path& opened, int flags)
        : path_(path), descriptor_(::open(opened.c_str(), flags | O_CLOEXEC, 0666)) {
        if (descriptor_ < 0) {
            fail(errno, path_);
        }
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
        if (descriptor_ >= 0) {
            ::close(descriptor_);
        }
    }

    /// The length of a plain file.
    std::uint64_t plain_size() const {
        struct stat status {};
        if (::fstat(descriptor_, &status) != 0) {
            fail(errno, path_);
        }
        if (!S_ISREG(status.st_mode)) {
            fail(S_ISDIR(status.st_mode) ? EISDIR : EINVAL, path_);
        }
        return static_cast<std::uint64_t>(status.st_size);
    }

    /// Up to `size` bytes; 0 at the end of the file.
    std::size_t read(void* data, std::size_t size) const {
        for (;;) {
            const ssize_t count = ::read(descriptor_, data, size);
            if (count >= 0) {
                return static_cast<std::size_t>(count);
            }
            if (errno != EINTR) {
                fail(errno, path_);
            }
        }
    }

    void write(const void* data, std::size_t size) const {
        const auto* bytes = static_cast<const std::uint8_t*>(data);
        while (size != 0) {
            const ssize_t count = ::write(descriptor_, bytes, size);
            if (count < 0) {
                if (errno == EINTR) {
                    continue;
                }
                fail(errno, path_);
            }
            bytes += count;
            size -= static_cast<std::size_t>(count);
        }
    }

    void flush_and_close() {
        if (::fsync(descriptor_) != 0) {
            fail(errno, path_);
        }
        const int closing = descriptor_;
        descriptor_ = -1;
        if (::close(closing) != 0) {
            fail(errno, path_);
        }
    }

private:
    const std::filesystem::path& path_;
    int descriptor_;
};

std::filesystem::path temporary_name(const std::filesystem::path& path) {
    std::random_device source;
    std::string name = ".";
    for (int word = 0; word < 4; ++word) {
        const unsigned value = source();
        for (int shift = 28; shift >= 0; shift -= 4) {
            name += "0123456789abcdef"[(value >> shift) & 15U];
        }
    }
    return path.parent_path() / (name + ".tmp");
}

}  // namespace

Bytes read_file(const std::filesystem::path& path, std::uint64_t limit, Links links) {
    // Without O_NONBLOCK, opening a pipe would wait for its writer.
    const Descriptor file(path, O_RDONLY | O_NONBLOCK | (links == Links::refuse ? O_NOFOLLOW : 0));
    const std::uint64_t size = file.plain_size();
    if (size > limit) {
        fail(EFBIG, path);
    }
    Bytes content(static_cast<std::size_t>(size));
    std::size_t filled = 0;
    while (filled < content.size()) {
        const std::size_t count = file.read(content.data() + filled, content.size() - filled);
        if (count == 0) {
            break;
        }
        filled += count;
    }
    content.resize(filled);
    return content;
}

std::string sha256_file(const std::filesystem::path& path) {
    const Descriptor file(path, O_RDONLY | O_NONBLOCK);
    file.plain_size();
    Bytes block(std::size_t{1} << 20);
    Sha256 digest;
    while (const std::size_t count = file.read(block.data(), block.size())) {
        digest.update(block.data(), count);
    }
    return digest.hex_digest();
}

void write_atomically(const std::filesystem::path& path,
                      const std::function<void(const Write&)>& content) {
    const std::filesystem::path temporary = temporary_name(path);
    // Anything but a new file of our own would be written through or shared.
    Descriptor file(path, temporary, O_WRONLY | O_CREAT | O_EXCL);
    try {
        content([&file](const void* data, std::size_t size) { file.write(data, size); });
        file.flush_and_close();
        if (::rename(temporary.c_str(), path.c_str()) != 0) {
            fail(errno, path);
        }
    } catch (...) {
        ::unlink(temporary.c_str());
        throw;
    }
}

}  // namespace sam3rt
