#include "attention.h"

#include "check.h"
#include "kernels.h"

namespace atman::cuda {
namespace {

// The caller's device again when the call is over.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
};

bool sees_no_key(const AttentionParams& p) { return p.keys == 0 && p.variants == 0; }

}  // namespace

void attend(const AttentionParams& p, Kernel kernel, const Tensor& workspace, int device, int multiprocessors,
            std::uintptr_t stream) {
    const std::string reason = refusal(p, kernel);
    if (!reason.empty()) throw std::invalid_argument("the kernel " + reason);
    if (multiprocessors < 1) throw std::invalid_argument("multiprocessors must be >= 1");
    if (p.batch * p.rows == 0) return;
    Launch launch;
    launch.stream = reinterpret_cast<cudaStream_t>(stream);
    launch.multiprocessors = multiprocessors;
    const OnDevice here(device);
    if (kernel == Kernel::plain || sees_no_key(p))
        return attend_plain(p, launch);  // a tensor map of nothing is invalid
#if defined(ATMAN_HAS_HOPPER)
    launch.splits = choose_splits(p, multiprocessors);
    launch.space = lay_out_workspace(p, launch.splits);
    if (workspace.bytes < launch.space.bytes)
        throw std::invalid_argument("workspace must have " + std::to_string(launch.space.bytes) + " bytes, got " +
                                    std::to_string(workspace.bytes));
    if (workspace.address % 128 != 0) throw std::invalid_argument("workspace must be aligned to 128 bytes");
    launch.workspace = reinterpret_cast<std::byte*>(workspace.address);
    make_plan(p, launch);
    attend_hopper(p, launch);
    if (launch.splits > 1) merge_splits(p, launch);
#else
    (void)workspace;
    throw std::invalid_argument("the kernel was not compiled: ATMAN_KERNELS_ARCHS was without 90a");
#endif
}

std::string device_problem(int device) {
    int driver = 0, runtime = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no CUDA driver";
    check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    if (driver / 1000 < runtime / 1000)
        return "it was built with CUDA " + std::to_string(runtime / 1000) + ", the driver knows CUDA " +
               std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
    try {
        const OnDevice here(device);
        int major = 0, minor = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
        if (has_code()) return "";
        return "it was compiled for " + architectures() + ", this GPU has compute capability " + std::to_string(major) +
               "." + std::to_string(minor);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
}

std::string architectures() { return ATMAN_CUDA_ARCHS; }

}  // namespace atman::cuda
