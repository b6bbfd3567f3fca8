// The same in C++.
#include <iostream>
#include <partialfc.hpp>

int main() {
  const auto device = partialfc::device::cpu(1);
  if (partialfc::version() != PFC_VERSION) return 1;
  std::cout << partialfc::build_info() << '\n' << device.info() << '\n';
}
