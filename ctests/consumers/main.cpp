// The same in C++.
#include <partialfc.h>

#include <iostream>
#include <memory>

int main() {
  pfc_device *made = nullptr;
  if (pfc_version() != PFC_VERSION || pfc_device_cpu(1, &made) != PFC_OK) {
    std::cerr << pfc_last_error() << '\n';
    return 1;
  }
  const std::unique_ptr<pfc_device, decltype(&pfc_device_free)> device(made, pfc_device_free);
  std::cout << pfc_build_info() << '\n' << pfc_device_info(device.get()) << '\n';
}
