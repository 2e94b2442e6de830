// Plays the roles of the dense decode kernel with narrow blocks against its barrier table, in random and in adversarial orders: nobody waits for ever,
// no phase is counted twice, and no buffer is written before its readers have let go of it.
#include <array>

#include "play.h"

using namespace played;

namespace {

sm90::DecodeConfig narrow(int head_dim, bool shares_pages) {
  return {mla::DType::kBf16, head_dim, shares_pages, sm90::kNarrowBlock};
}

struct Piece {
  int q_slots, key_slots;
};

// What the loader makes of the first piece before it knows it: nothing, the piece itself, or another one of so many slots.
struct Guess {
  bool is_made = false;
  int wrong_slots = 0;
};

// Half of a slot; where pages are shared, one half is loaded by either CTA of the pair. The number of the use that wrote it.
using SlotContent = std::array<int, 2>;

// One CTA. The kernel's program, as seen by the barriers. A CTA that shares pages has to be joined with another one.
class Cta : public PlayedCta<Cta> {
  friend PlayedCta<Cta>;

 public:
  Cta(const std::vector<Piece>& pieces, const sm90::DecodeConfig& config, int most_in_flight, Guess guess)
      : PlayedCta(config),
        slot_content_(static_cast<size_t>(config.ring_slots()), SlotContent{-1, -1}),
        most_in_flight_(most_in_flight),
        shares_pages_(config.shares_pages) {
    const bool is_right = guess.is_made && guess.wrong_slots == 0 && !pieces.empty();
    add_planner(static_cast<int>(pieces.size()), is_right);
    add_loader(pieces, guess, is_right);
    for (int warp = 0; warp < sm90::kScoreWarps; ++warp) add_score_warp(pieces);
    for (int warp = 0; warp < sm90::kOutputWarps; ++warp) add_output_warp(pieces);
  }

 private:
  SlotContent& content(int n) { return slot_content_[static_cast<size_t>(n) % slot_content_.size()]; }
  void read_slot(Role& r, int n) {
    r.act([this, n] { CHECK(content(n) == SlotContent{n, n}); });
  }
  void release_slot(Role& r, int n) {
    if (shares_pages_) {
      release_both(r, Barrier::kSlotEmpty, n);
    } else {
      arrive(r, Barrier::kSlotEmpty, n);
    }
  }

  void add_planner(int pieces, bool is_right) {
    Role r{"planner", {}};
    for (int i = 0; i <= pieces; ++i) {  // the last one says that there are no more
      if (i == 0) wait_full(r, Barrier::kGuessJudged, 0);
      if (i == 0 && is_right) continue;
      wait_empty(r, Barrier::kWorkEmpty, i);
      arrive(r, Barrier::kWorkFull, i);
    }
    roles_.push_back(std::move(r));
  }

  void judge(Role& r, bool is_right, int wrong_slots) {
    for (int n = 0; n < wrong_slots; ++n) {
      wait_full(r, Barrier::kSlotFull, n);
      arrive(r, Barrier::kSlotFull, n);
    }
    arrive(r, Barrier::kGuessJudged, 0);
    if (is_right) arrive(r, Barrier::kWorkFull, 0);
  }

  void add_loader(const std::vector<Piece>& pieces, Guess guess, bool is_right) {
    Role r{"loader", {}};
    const int wrong_slots = guess.is_made ? guess.wrong_slots : 0;
    for (int n = 0; n < wrong_slots; ++n) r.act([this] { ++issued_; });
    add_wrong_copies(wrong_slots);
    if (!is_right) judge(r, false, wrong_slots);
    int slot = 0;
    // Of each slot. The first keys of a piece are not: one CTA may have guessed them.
    std::vector<bool> is_shared;
    for (size_t i = 0; i < pieces.size(); ++i) {
      bool is_guess = i == 0 && is_right;
      if (!is_guess) wait_full(r, Barrier::kWorkFull, static_cast<int>(i));
      const int slots = pieces[i].q_slots + pieces[i].key_slots;
      for (int k = 0; k < slots; ++k) {
        if (is_guess && k > pieces[i].q_slots) {  // behind the first keys
          judge(r, true, 0);
          is_guess = false;
        }
        const bool is_limited =
            !is_guess && (k == 0 || k >= pieces[i].q_slots);  // the slots of Q are asked for together
        if (is_limited && slot >= most_in_flight_) wait_full(r, Barrier::kSlotFull, slot - most_in_flight_);
        wait_empty(r, Barrier::kSlotEmpty, slot);
        r.act([this] { ++issued_; });
        is_shared.push_back(shares_pages_ && k > pieces[i].q_slots);
        ++slot;
      }
      if (is_guess) judge(r, true, 0);
      arrive(r, Barrier::kWorkEmpty, static_cast<int>(i));
    }
    for (int n = slot; shares_pages_ && n < slot + barriers_.stages(Barrier::kSlotEmpty); ++n)
      wait_empty(r, Barrier::kSlotEmpty, n);
    roles_.push_back(std::move(r));
    for (int first = 0; first < 2; ++first) add_copies(first, is_shared, wrong_slots);
  }

  // Of a wrong guess: never read.
  void add_wrong_copies(int slots) {
    for (int n = 0; n < slots; ++n) {
      Role r{"copies", {}};
      r.wait([this, n] { return issued_ > n; });
      r.act([this, n] { content(n) = {-1, -1}; });
      arrive(r, Barrier::kSlotFull, n);
      roles_.push_back(std::move(r));
    }
  }

  // What this CTA asked for lands: where pages are shared half of the slot, in both CTAs, whether the other one has asked for its half or not.
  void land(int n, bool is_shared) {
    if (!is_shared) {
      content(n) = {n, n};
      return;
    }
    content(n)[rank_] = n;
    other().content(n)[rank_] = n;
  }

  // The bytes of every second slot land, some time after the load was issued: so neighbours land in either order.
  void add_copies(int first, const std::vector<bool>& is_shared, int wrong_slots) {
    Role r{"copies", {}}, counts{"copies", {}};
    for (size_t at = static_cast<size_t>(first); at < is_shared.size(); at += 2) {
      const int n = static_cast<int>(at);
      const bool shared = is_shared[at];
      const auto is_issued = [this, n, wrong_slots] { return issued_ > wrong_slots + n; };
      r.wait(is_issued);
      r.act([this, n, shared] { land(n, shared); });
      counts.wait([this, n, is_issued] { return is_issued() && content(n) == SlotContent{n, n}; });
      arrive(counts, Barrier::kSlotFull, n);
    }
    roles_.push_back(std::move(r));
    roles_.push_back(std::move(counts));
  }

  void add_score_warp(const std::vector<Piece>& pieces) {
    Role r{"scores", {}};
    int slot = 0, p = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
      wait_full(r, Barrier::kWorkFull, static_cast<int>(i));
      for (int k = 0; k < pieces[i].q_slots; ++k) wait_full(r, Barrier::kSlotFull, slot + k);
      for (int k = 0; k < pieces[i].q_slots; ++k, ++slot) {
        read_slot(r, slot);
        release_slot(r, slot);
        release_slot(r, slot);
      }
      for (int k = 0; k < pieces[i].key_slots; ++k, ++slot) {
        // The kernel may hand the last P over before or after this wait; after is the harder case.
        wait_full(r, Barrier::kSlotFull, slot);
        read_slot(r, slot);
        if (k > 0) arrive(r, Barrier::kPFull, p++);
        wait_empty(r, Barrier::kPEmpty, p);
      }
      if (pieces[i].key_slots > 0) arrive(r, Barrier::kPFull, p++);
      wait_empty(r, Barrier::kScaleEmpty, static_cast<int>(i));
      for (int k = 0; k < sm90::kScaleWriters / sm90::kScoreWarps; ++k)
        arrive(r, Barrier::kScaleFull, static_cast<int>(i));
      arrive(r, Barrier::kWorkEmpty, static_cast<int>(i));
    }
    roles_.push_back(std::move(r));
  }

  void add_output_warp(const std::vector<Piece>& pieces) {
    Role r{"outputs", {}};
    int slot = 0, p = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
      wait_full(r, Barrier::kWorkFull, static_cast<int>(i));
      slot += pieces[i].q_slots;
      for (int k = 0; k < pieces[i].key_slots; ++k, ++slot, ++p) {
        wait_full(r, Barrier::kSlotFull, slot);
        wait_full(r, Barrier::kPFull, p);
        read_slot(r, slot);
        release_slot(r, slot);
        arrive(r, Barrier::kPEmpty, p);
      }
      wait_full(r, Barrier::kScaleFull, static_cast<int>(i));
      arrive(r, Barrier::kScaleEmpty, static_cast<int>(i));
      arrive(r, Barrier::kWorkEmpty, static_cast<int>(i));
    }
    roles_.push_back(std::move(r));
  }

  std::vector<SlotContent> slot_content_;
  int most_in_flight_;
  bool shares_pages_;
  int issued_ = 0;
};

Guess any_guess(std::mt19937& random) {
  return {random() % 3 > 0, random() % 2 > 0 ? 2 + static_cast<int>(random() % 2) : 0};
}

}  // namespace

TEST_CASE("every order of the roles comes to an end") {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<Piece> pieces(random() % 7);
    for (Piece& piece : pieces) piece = {1 + static_cast<int>(random() % 2), static_cast<int>(random() % 18)};
    for (const int head_dim : {576, 512}) {
      const sm90::DecodeConfig config = narrow(head_dim, false);
      const int most_in_flight = 1 + static_cast<int>(random() % static_cast<unsigned>(config.ring_slots()));
      const Guess guess = any_guess(random);
      play_orders<Cta>(random, [&](const auto& played) {
        Cta cta(pieces, config, most_in_flight, guess);
        played({&cta});
      });
    }
  }
}

TEST_CASE("every order of two CTAs that share pages comes to an end") {
  std::mt19937 random(2);
  for (int round = 0; round < 200; ++round) {
    std::vector<Piece> pieces(random() % 7);
    for (Piece& piece : pieces) piece = {2, static_cast<int>(random() % 18)};
    for (const int head_dim : {576, 512}) {
      const sm90::DecodeConfig config = narrow(head_dim, true);
      const int most_in_flight = 1 + static_cast<int>(random() % static_cast<unsigned>(config.ring_slots() - 1));
      const Guess guesses[] = {any_guess(random), any_guess(random)};
      play_orders<Cta>(random, [&](const auto& played) {
        Cta a(pieces, config, most_in_flight, guesses[0]), b(pieces, config, most_in_flight, guesses[1]);
        Cta::join(a, b);
        played({&a, &b});
      });
    }
  }
}

TEST_CASE("the barrier table is complete") {
  for (const sm90::BarrierSpec& spec : sm90::kBarriers) {
    CHECK(spec.stages >= 1);
    CHECK(spec.arrivals >= 1);
    CHECK(std::string(spec.name).size() > 0);
  }
  CHECK(sm90::kBarrierCount * 8 < 1024);
}
