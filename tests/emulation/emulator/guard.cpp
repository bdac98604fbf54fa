// The parts of a CUDA backend that PyTorch's C++ asks for, with no GPU behind them: a device guard, so that autograd
// has a thread for every device and each thread has a current device, and the hooks.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

constexpr DeviceIndex kDevices = DEVICES;
static thread_local DeviceIndex current = 0;

extern "C" int emulated_current_device() { return current; }
extern "C" void emulated_set_device(int index) { current = static_cast<DeviceIndex>(index); }

struct EmulatedGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static DeviceIndex exchange(DeviceIndex index) {
    DeviceIndex before = current;
    current = index;
    return before;
  }
  Device exchangeDevice(Device device) const override { return Device(DeviceType::CUDA, exchange(device.index())); }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device device) const override { current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, EmulatedGuard);

namespace at {
struct EmulatedHooks final : CUDAHooksInterface {
  EmulatedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return EmulatedGuard::exchange(index); }
  int getNumGPUs() const override { return kDevices; }
  void deviceSynchronize(DeviceIndex) const override {}
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", EmulatedHooks);
}  // namespace at
