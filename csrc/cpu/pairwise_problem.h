// Pairwise family: the arguments that its operators share, for both back ends.
#pragma once

#include <optional>

#include "pairwise.h"
#include "tensors.h"

namespace counterpoise {

inline void* place_of(const std::optional<Tensor>& x) { return x ? x->mutable_data_ptr() : nullptr; }

// Ids are (2, N), rows above labels; everything is contiguous and of the products' type.
template <class Id>
PairwiseTileOf<Id> pairwise_tile(const Tensor& products, int64_t row, int64_t column, int64_t positive,
                                 int64_t candidate, const std::optional<Tensor>& query_ids,
                                 const std::optional<Tensor>& key_ids, const std::optional<Tensor>& index,
                                 const std::optional<Tensor>& probability, const std::optional<Tensor>& itself,
                                 const std::optional<Tensor>& log_weight, double sharpness) {
  constexpr ScalarType id_type = sizeof(Id) == 4 ? ScalarType::Int : ScalarType::Long;
  for (const auto* ids : {&query_ids, &key_ids})
    STD_TORCH_CHECK(!*ids || (*ids)->scalar_type() == id_type, "ids are of the other device's type");
  const auto* q = static_cast<const Id*>(data_of(query_ids));
  const auto* k = static_cast<const Id*>(data_of(key_ids));
  return {products.mutable_data_ptr(),
          computed_type(products) == ScalarType::Double,
          products.size(0),
          products.size(1),
          row,
          column,
          static_cast<int>(positive),
          static_cast<int>(candidate),
          q,
          query_ids ? q + query_ids->size(1) : nullptr,
          k,
          key_ids ? k + key_ids->size(1) : nullptr,
          static_cast<const int64_t*>(data_of(index)),
          data_of(probability),
          index ? index->size(1) : 0,
          static_cast<const int64_t*>(data_of(itself)),
          data_of(log_weight),
          sharpness};
}

#define CP_PAIRWISE_SETTINGS                                                                              \
  const Tensor &products, int64_t row, int64_t column, int64_t positive, int64_t candidate,               \
      std::optional<Tensor> query_ids, std::optional<Tensor> key_ids, std::optional<Tensor> index,        \
      std::optional<Tensor> probability, std::optional<Tensor> itself, std::optional<Tensor> log_weight,  \
      double sharpness
#define CP_PAIRWISE_TILE(Id)                                                                              \
  pairwise_tile<Id>(products, row, column, positive, candidate, query_ids, key_ids, index, probability,   \
                    itself, log_weight, sharpness)

}  // namespace counterpoise
