// Arrays and numbers between a test and the program that it runs: raw bytes in a folder, one file an array.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

class Folder {
 public:
  explicit Folder(std::string path) : path_(std::move(path)) {
    std::ifstream file(path_ + "/numbers");
    std::string name, value;
    while (file >> name >> value) numbers_[name] = std::strtod(value.c_str(), nullptr);  // knows infinity
  }

  double number(const std::string& name) const { return numbers_.at(name); }
  int64_t whole(const std::string& name) const { return static_cast<int64_t>(number(name)); }

  // An array in a heap block of just its size; null where the test gave none. `<name>_offset` bytes are left out in
  // front, for pointers that are not aligned.
  const void* read(const std::string& name) {
    std::ifstream file(path_ + "/" + name, std::ios::binary);
    if (!file) return nullptr;
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    const auto offset = numbers_.find(name + "_offset");
    const std::size_t skipped = offset == numbers_.end() ? 0 : static_cast<std::size_t>(offset->second);
    char* begin = room(skipped + bytes.size()) + skipped;
    std::copy(bytes.begin(), bytes.end(), begin);
    return begin;
  }

  // Room for a result, which keep() writes to its file.
  void* result(const std::string& name, std::size_t bytes) {
    char* begin = room(bytes);
    results_[name] = {begin, bytes};
    return begin;
  }

  void keep() const {
    for (const auto& [name, where] : results_)
      std::ofstream(path_ + "/" + name, std::ios::binary).write(where.first, static_cast<std::streamsize>(where.second));
  }

 private:
  char* room(std::size_t bytes) {
    rooms_.push_back(std::make_unique<char[]>(bytes));
    return rooms_.back().get();
  }

  std::string path_;
  std::map<std::string, double> numbers_;
  std::map<std::string, std::pair<const char*, std::size_t>> results_;
  std::vector<std::unique_ptr<char[]>> rooms_;
};
