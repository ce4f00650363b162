// Tables that a thread has read before. A network calls with the same few again and again, and to check one that lists a
// thousand channels takes a tenth of a call.
//
// A table is known again by all that it says, never by where it lies: comparing takes a tenth of checking, and whoever
// writes to a table, or frees it, gets what it says now.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/partition.h"

namespace groupconv {

// What parse_partition makes of the table, made now or earlier; null, and in `wrong` why, where it refuses it.
std::shared_ptr<const PartitionView> known_partition(const int32_t* table, int64_t length,
                                                     int64_t in_channels, int64_t out_channels,
                                                     std::string& wrong);

}  // namespace groupconv
