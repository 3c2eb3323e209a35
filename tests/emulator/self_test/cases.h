// Self-tests by name, entered by the files that have them.
#pragma once

#include <functional>
#include <map>
#include <string>

using Cases = std::map<std::string, std::function<void()>>;

void add_basic_cases(Cases& cases);
void add_warp_cases(Cases& cases);
void add_cluster_cases(Cases& cases);
void add_grid_cases(Cases& cases);
