// The same for wide blocks: a pair of CTAs, a ring of slots of two column groups, loads of several slots, the rope and Q in places of their own.
#include <array>

#include "play.h"

using namespace played;

namespace {

// Who wrote each half of a slot; the two CTAs load one each.
using SlotContent = std::array<int, 2>;

class WideCta : public PlayedCta<WideCta> {
  friend PlayedCta<WideCta>;

 public:
  // blocks: of each piece.
  WideCta(const std::vector<int>& blocks, const sm90::DecodeConfig& config)
      : PlayedCta(config), config_(config), slots_(static_cast<size_t>(config.ring_slots()), SlotContent{-1, -1}) {
    add_planner(static_cast<int>(blocks.size()));
    add_loader(blocks);
    for (int warp = 0; warp < sm90::kScoreWarps; ++warp) add_score_warp(blocks);
    for (int half = 0; half < 2; ++half) {
      for (int warp = 0; warp < sm90::kOutputWarps / 2; ++warp) add_output_warp(blocks, half);
    }
    if (config.has_prefetcher()) add_prefetcher(static_cast<int>(blocks.size()));
  }

 private:
  int q_slots() const { return config_.q_first_shared_group() / config_.slot_groups(); }
  bool has_rope() const { return config_.rope_places() > 0; }

  SlotContent& slot(int n) { return slots_[static_cast<size_t>(n) % slots_.size()]; }
  void read_slot(Role& r, int n) {
    r.act([this, n] { CHECK(slot(n) == SlotContent{n, n}); });
  }

  void add_planner(int pieces) {
    Role r{"planner", {}};
    wait_full(r, Barrier::kGuessJudged, 0);
    for (int i = 0; i <= pieces; ++i) {  // the last one says that there are no more
      wait_empty(r, Barrier::kWorkEmpty, i);
      arrive(r, Barrier::kWorkFull, i);
    }
    roles_.push_back(std::move(r));
  }

  // What the loader has asked for lands some time later.
  void land(std::function<bool()> is_issued, std::function<void()> write) {
    Role r{"copies", {}};
    r.wait(std::move(is_issued));
    r.act(std::move(write));
    roles_.push_back(std::move(r));
  }
  // The barrier of a load counts once it was told of the bytes and all are there.
  void count(Barrier id, int n, std::function<bool()> is_there) {
    Role r{"copies", {}};
    r.wait(std::move(is_there));
    arrive(r, id, n);
    roles_.push_back(std::move(r));
  }
  // A step of the loader that others can wait for.
  std::function<bool()> issue(Role& r) {
    const int step = steps_++;
    r.act([this, step] { issued_ = step + 1; });
    return [this, step] { return issued_ > step; };
  }

  // One half of a slot of keys, into both CTAs.
  void load_half(Role& r, int n) {
    land(issue(r), [this, n] {
      slot(n)[rank_] = n;
      other().slot(n)[rank_] = n;
    });
  }

  void load_q(Role& r, int piece, int& n, int& load) {
    const int first = n, slots = q_slots();
    for (int k = 0; k < slots; ++k) wait_empty(r, Barrier::kSlotEmpty, first + k);
    const auto is_issued = issue(r);
    land(is_issued, [this, first, slots] {
      for (int k = 0; k < slots; ++k) slot(first + k) = {first + k, first + k};
    });
    count(Barrier::kSlotFull, load++,
          [this, is_issued, last = first + slots - 1] { return is_issued() && slot(last) == SlotContent{last, last}; });
    n += slots;
    wait_empty(r, Barrier::kQEmpty, piece);
    const auto is_rest_issued = issue(r);
    land(is_rest_issued, [this, piece] { q_ = piece; });
    count(Barrier::kQFull, piece, [this, is_rest_issued, piece] { return is_rest_issued() && q_ == piece; });
  }

  void load_block(Role& r, int block, int& n, int& load) {
    const int first = n, early = config_.early_slots(), last = first + early;
    std::function<bool()> is_told;
    for (int k = 0; k < early; ++k) {
      wait_empty(r, Barrier::kSlotEmpty, first + k);
      if (k == 0) is_told = issue(r);
      load_half(r, first + k);
    }
    count(Barrier::kSlotFull, load++, [this, is_told, first, last] {
      for (int k = first; k < last; ++k) {
        if (slot(k) != SlotContent{k, k}) return false;
      }
      return is_told();
    });
    if (has_rope()) wait_empty(r, Barrier::kRopeEmpty, block);
    if (!has_rope()) wait_empty(r, Barrier::kSlotEmpty, last);
    const auto is_late_told = issue(r);
    if (has_rope()) {
      land(is_late_told, [this, block] {  // only one CTA's turn
        if (block % 2 != static_cast<int>(rank_)) return;
        rope_ = other().rope_ = block;
      });
      wait_empty(r, Barrier::kSlotEmpty, last);
    }
    load_half(r, last);
    count(Barrier::kSlotFull, load++, [this, is_late_told, last, block] {
      return is_late_told() && slot(last) == SlotContent{last, last} && (!has_rope() || rope_ == block);
    });
    n = last + 1;
  }

  void add_loader(const std::vector<int>& blocks) {
    Role r{"loader", {}};
    arrive(r, Barrier::kGuessJudged, 0);
    int n = 0, load = 0, block = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int piece = static_cast<int>(i);
      wait_full(r, Barrier::kWorkFull, piece);
      load_q(r, piece, n, load);
      for (int k = 0; k < blocks[i]; ++k) load_block(r, block++, n, load);
      arrive(r, Barrier::kWorkEmpty, piece);
    }
    for (int k = 0; k < config_.ring_slots(); ++k) wait_empty(r, Barrier::kSlotEmpty, n + k);
    if (has_rope()) wait_empty(r, Barrier::kRopeEmpty, block);
    roles_.push_back(std::move(r));
  }

  void add_score_warp(const std::vector<int>& blocks) {
    Role r{"scores", {}};
    int n = 0, load = 0, block = 0, p = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int piece = static_cast<int>(i);
      wait_full(r, Barrier::kWorkFull, piece);
      wait_full(r, Barrier::kSlotFull, load++);
      for (int k = 0; k < q_slots(); ++k, ++n) {
        read_slot(r, n);
        release_both(r, Barrier::kSlotEmpty, n);
      }
      const auto read_q = [&] { r.act([this, piece] { CHECK(q_ == piece); }); };
      for (int k = 0; k < blocks[i]; ++k, n += config_.slots_of_block(), ++block) {
        wait_full(r, Barrier::kSlotFull, load++);
        for (int j = 0; j < config_.early_slots(); ++j) read_slot(r, n + j);
        if (k == 0) wait_full(r, Barrier::kQFull, piece);
        wait_full(r, Barrier::kSlotFull, load++);
        read_slot(r, n + config_.early_slots());
        r.act([this, block] { CHECK((!has_rope() || rope_ == block)); });
        read_q();
        if (k > 0) arrive(r, Barrier::kPFull, p++);  // not before, however late the keys are
        wait_empty(r, Barrier::kPEmpty, p);
        if (has_rope()) release_both(r, Barrier::kRopeEmpty, block);
        if (k + 1 == blocks[i]) arrive(r, Barrier::kQEmpty, piece);
      }
      if (blocks[i] > 0) {
        arrive(r, Barrier::kPFull, p++);
      } else {
        wait_full(r, Barrier::kQFull, piece);
        read_q();
        arrive(r, Barrier::kQEmpty, piece);
      }
      wait_empty(r, Barrier::kScaleEmpty, piece);
      for (int k = 0; k < sm90::kScaleWriters / sm90::kScoreWarps; ++k) arrive(r, Barrier::kScaleFull, piece);
      arrive(r, Barrier::kWorkEmpty, piece);
    }
    roles_.push_back(std::move(r));
  }

  void add_output_warp(const std::vector<int>& blocks, int half) {
    Role r{"outputs", {}};
    int n = 0, p = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int piece = static_cast<int>(i);
      wait_full(r, Barrier::kWorkFull, piece);
      n += q_slots();
      for (int k = 0; k < blocks[i]; ++k, n += config_.slots_of_block(), ++p) {
        const int load = config_.loads_of_block() * p + piece + 1;  // as roles/outputs.cuh has it
        wait_full(r, Barrier::kSlotFull, load);
        if (half == 1) wait_full(r, Barrier::kSlotFull, load + 1);
        wait_full(r, Barrier::kPFull, p);
        if (half == 1) wait_full(r, Barrier::kTurn, p);
        for (int j = 0; j < 2; ++j) {
          read_slot(r, n + 2 * half + j);
          if (half == 0 && j == 0) arrive(r, Barrier::kTurn, p);
          release_both(r, Barrier::kSlotEmpty, n + 2 * half + j);
        }
        arrive(r, Barrier::kPEmpty, p);
      }
      wait_full(r, Barrier::kScaleFull, piece);
      arrive(r, Barrier::kScaleEmpty, piece);
      arrive(r, Barrier::kWorkEmpty, piece);
    }
    roles_.push_back(std::move(r));
  }

  // What it waits for besides, it does not wait for long.
  void add_prefetcher(int pieces) {
    Role r{"prefetcher", {}};
    for (int i = 0; i < pieces; ++i) {
      wait_full(r, Barrier::kWorkFull, i);
      arrive(r, Barrier::kWorkEmpty, i);
    }
    roles_.push_back(std::move(r));
  }

  sm90::DecodeConfig config_;
  std::vector<SlotContent> slots_;
  int rope_ = -1, q_ = -1;
  int steps_ = 0, issued_ = 0;
};

}  // namespace

TEST_CASE("every order of two CTAs with wide blocks comes to an end") {
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    std::vector<int> blocks(random() % 7);
    for (int& n : blocks) n = static_cast<int>(random() % (round % 2 == 0 ? 3 : 12));
    for (const int head_dim : {576, 512}) {
      const sm90::DecodeConfig config{mla::DType::kBf16, head_dim, true, sm90::kWideBlock};
      play_orders<WideCta>(random, [&](const auto& played) {
        WideCta a(blocks, config), b(blocks, config);
        WideCta::join(a, b);
        played({&a, &b});
      });
    }
  }
}
