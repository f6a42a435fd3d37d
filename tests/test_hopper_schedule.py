"""The tile scheduler and split-K of the Hopper kernels, compiled for the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lightning_fastmoe.errors import KernelsUnavailableError
from lightning_fastmoe.ops import _build

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>

#include "weight_gradient.cuh"

using namespace lightning_fastmoe::hopper;

#define CHECK(condition)                                   \
  do {                                                     \
    if (condition) break;                                  \
    std::printf("line %d: %s\n", __LINE__, #condition);   \
    return 1;                                              \
  } while (0)

int main() {
  // Every tile once, none outside.
  for (int m_pairs = 1; m_pairs <= 40; ++m_pairs) {
    for (int n_tiles = 1; n_tiles <= 7; ++n_tiles) {
      std::set<std::pair<int, int>> seen;
      for (int index = 0; index < m_pairs * n_tiles; ++index) {
        const TileCoordinates at = rasterize(index, m_pairs, n_tiles);
        CHECK(at.m >= 0 && at.m < m_pairs && at.n >= 0 && at.n < n_tiles);
        seen.insert({at.m, at.n});
      }
      CHECK(static_cast<int>(seen.size()) == m_pairs * n_tiles);
    }
  }
  // Every tile once over both blocks of all clusters; no block but the last may be idle.
  for (int m_tiles = 1; m_tiles <= 41; ++m_tiles) {
    for (int n_tiles = 1; n_tiles <= 7; ++n_tiles) {
      std::set<std::pair<int, int>> seen;
      int idle = 0;
      for (int index = 0; index < count_work_tiles(m_tiles, n_tiles); ++index) {
        for (int rank = 0; rank < kClusterSize; ++rank) {
          const WorkTile tile = make_work_tile(index, m_tiles, n_tiles, rank);
          const WorkTile other = make_work_tile(index, m_tiles, n_tiles, 1 - rank);
          CHECK(tile.m >= 0 && tile.m < m_tiles && tile.n >= 0);
          CHECK(tile.multicast == other.multicast && tile.first_n == other.first_n);
          CHECK(tile.first_n <= tile.n);
          if (tile.multicast) {
            CHECK(tile.n == other.n && tile.m / kClusterSize == other.m / kClusterSize);
          }
          if (tile.n >= n_tiles) {
            ++idle;
          } else {
            CHECK(seen.insert({tile.m, tile.n}).second);
          }
        }
      }
      CHECK(static_cast<int>(seen.size()) == m_tiles * n_tiles && idle <= 1);
    }
  }
  // A swizzled tile is a permutation of its 16-byte vectors.
  std::set<unsigned> positions;
  for (unsigned row = 0; row < 64; ++row) {
    for (unsigned vector = 0; vector < 8; ++vector) positions.insert(swizzled(row, vector));
  }
  CHECK(positions.size() == 512 && *positions.begin() == 0 && *positions.rbegin() == 511 * 16);
  // The workspace holds the splits of any routing, whose number is bounded.
  std::srand(1);
  for (int trial = 0; trial < 20000; ++trial) {
    const int experts = 1 + std::rand() % 64, m = 8 * (1 + std::rand() % 512);
    const int n = 8 * (1 + std::rand() % 512);
    int64_t rows = 0;
    int counts[64];
    for (int e = 0; e < experts; ++e) {
      counts[e] = std::rand() % 4 == 0 ? std::rand() % 20000 : std::rand() % 300;
      rows += counts[e];
    }
    const int64_t split_rows = rows_per_split(rows, m, n, 132);
    CHECK(split_rows >= kTileK && split_rows % kTileK == 0);
    int64_t sum = 0;
    for (int e = 0; e < experts; ++e) {
      const int splits = count_splits(counts[e], static_cast<int>(split_rows));
      CHECK(splits >= 1 && int64_t{splits} * split_rows >= counts[e]);
      if (splits > 1) sum += splits;
    }
    CHECK(sum <= max_splits(rows, split_rows));
    // The last wave has room for its splits.
    const LastWave last = split_last_wave(rows, m, n, experts, 132);
    const int tiles = experts * tiles_of_gradient(m, n), clusters = 132 / kClusterSize;
    CHECK(last.tiles == 0 || last.tiles == tiles % clusters);
    CHECK(last.tiles == 0 ? last.splits == 1 : last.splits >= 2 && last.splits <= 4);
    CHECK(last.tiles * last.splits <= clusters);
  }
  // The bound on splits is exact: as many experts as can be split, each just long enough.
  for (int split_rows = 64; split_rows <= 640; split_rows += 64) {
    for (int rows = 1; rows < 4000; rows += 7) {
      const int experts = rows / (split_rows + 1);
      const int last = rows - (experts - 1) * (split_rows + 1);  // what is left goes to one of them
      const int splits = experts == 0 ? 0 : 2 * (experts - 1) + count_splits(last, split_rows);
      CHECK(max_splits(rows, split_rows) == splits);
    }
  }
  // Experts are sorted by rows; every other wave runs backwards: no cluster gets all long tiles.
  for (int trial = 0; trial < 200; ++trial) {
    constexpr int kExperts = 64, kClusters = 66, kTiles = 20;
    int rows[kExperts], by_rows[kExperts];
    double total = 0, busiest = 0, busy[kClusters] = {};
    std::set<int> numbers;
    for (int e = 0; e < kExperts; ++e) {
      rows[e] = std::rand() % 4 == 0 ? 2000 + std::rand() % 6000 : 50 + std::rand() % 1000;
      total += rows[e];
    }
    std::set<int> ranks;
    for (int e = 0; e < kExperts; ++e) {
      const int rank = rank_by_rows(e, kExperts, [&](int i) { return rows[i]; });
      CHECK(ranks.insert(rank).second && rank >= 0 && rank < kExperts);
      by_rows[rank] = e;
    }
    for (int i = 1; i < kExperts; ++i) CHECK(rows[by_rows[i - 1]] >= rows[by_rows[i]]);
    for (int wave = 0; wave * kClusters < kExperts * kTiles; ++wave) {
      for (int cluster = 0; cluster < kClusters; ++cluster) {
        const int number = number_in_wave(wave, cluster, kClusters);
        if (number >= kExperts * kTiles) continue;
        CHECK(numbers.insert(number).second);
        busy[cluster] += rows[by_rows[number / kTiles]];
        busiest = busy[cluster] > busiest ? busy[cluster] : busiest;
      }
    }
    CHECK(static_cast<int>(numbers.size()) == kExperts * kTiles);
    CHECK(busiest <= 1.15 * total * kTiles / kClusters);
  }
  // (32768, 768, 3072, 8, 1): 288 work tiles for 66 clusters, so 24 are left, in two splits each.
  const LastWave last = split_last_wave(32768, 768, 3072, 8, 132);
  CHECK(last.tiles == 24 && last.splits == 2);
  CHECK(split_last_wave(8192, 1024, 4096, 64, 132).tiles == 0);  // 62 waves: too little to gain
  // An even routing of many experts is not split, nor is one whose tiles keep the GPU busy.
  CHECK(rows_per_split(128 * 1536, 1536, 256, 132) > 1536 * 2);
  CHECK(max_splits(1000, rows_per_split(1000, 4096, 14336, 132)) == 0);
  return 0;
}
"""


def test_every_tile_is_scheduled_once_and_splits_fit_their_bounds(tmp_path: Path) -> None:
    try:
        nvcc = _build.find_nvcc()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    source, program = tmp_path / "schedule.cu", tmp_path / "schedule"
    source.write_text(PROGRAM)
    folder = _build.SOURCES / "hopper"
    command = [str(nvcc), "-std=c++20", f"-I{folder}", "-o", str(program), str(source)]
    command += ["-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
