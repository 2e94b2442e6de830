// Roles as lists of steps, and orders to play them in.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/sm90/protocol.h"

namespace played {

namespace sm90 = mla::cuda::sm90;
using sm90::Barrier;

// What an mbarrier does: counts arrivals; a wait for a parity passes once the phase of that parity is over.
struct PlayedBarrier {
  int arrivals_of_phase = 0;
  int pending = 0;
  int phase = 0;

  void arrive() {
    REQUIRE(pending > 0);
    if (--pending == 0) {
      pending = arrivals_of_phase;
      ++phase;
    }
  }
  bool is_over(int parity) const { return (phase & 1) != parity; }
};

struct Barriers {
  std::vector<std::vector<PlayedBarrier>> all;

  explicit Barriers(const sm90::DecodeConfig& config) {
    for (const sm90::BarrierSpec& spec : sm90::kBarriers) {
      const int arrivals = sm90::arrivals_of(spec, config);
      REQUIRE(sm90::stages_of(spec, config) <= spec.stages);
      all.emplace_back(static_cast<size_t>(sm90::stages_of(spec, config)), PlayedBarrier{arrivals, arrivals, 0});
    }
  }
  int stages(Barrier id) const { return static_cast<int>(all[static_cast<size_t>(id)].size()); }
  // The n-th use of a ring of buffers.
  PlayedBarrier& of_use(Barrier id, int n) { return all[static_cast<size_t>(id)][static_cast<size_t>(n % stages(id))]; }
  bool is_full(Barrier id, int n) { return of_use(id, n).is_over(n / stages(id) % 2); }
  bool is_empty(Barrier id, int n) { return of_use(id, n).is_over((n / stages(id) + 1) % 2); }
};

// A role is a list of steps; a step that cannot be taken yet returns false and is tried again.
struct Role {
  std::string name;
  std::vector<std::function<bool()>> steps;
  size_t next = 0;

  void wait(std::function<bool()> condition) { steps.push_back(std::move(condition)); }
  void act(std::function<void()> action) {
    steps.push_back([action = std::move(action)] {
      action();
      return true;
    });
  }
  bool is_done() const { return next == steps.size(); }
};

// A CTA as its barriers and roles, perhaps one of a pair. What the roles do is Self's.
template <class Self>
class PlayedCta {
 public:
  PlayedCta(const PlayedCta&) = delete;  // the roles point to it

  std::vector<Role>& roles() { return roles_; }

  static void join(Self& a, Self& b) {
    a.other_ = &b;
    b.other_ = &a;
    b.rank_ = 1;
  }

 protected:
  explicit PlayedCta(const sm90::DecodeConfig& config) : barriers_(config) {}

  void wait_full(Role& r, Barrier id, int n) {
    r.wait([this, id, n] { return barriers_.is_full(id, n); });
  }
  void wait_empty(Role& r, Barrier id, int n) {
    r.wait([this, id, n] { return barriers_.is_empty(id, n); });
  }
  void arrive(Role& r, Barrier id, int n) {
    r.act([this, id, n] { barriers_.of_use(id, n).arrive(); });
  }
  // The other CTA, which must not have ended: what its copy engine does may come later.
  Self& other() const {
    const std::vector<Role>& roles = other_->roles_;
    REQUIRE(std::any_of(roles.begin(), roles.end(), [](const Role& r) { return r.name != "copies" && !r.is_done(); }));
    return *other_;
  }
  // The own barrier, then the other CTA's.
  void release_both(Role& r, Barrier id, int n) {
    arrive(r, id, n);
    r.act([this, id, n] { other().barriers_.of_use(id, n).arrive(); });
  }

  Barriers barriers_;
  std::vector<Role> roles_;
  Self* other_ = nullptr;
  size_t rank_ = 0;  // in the pair
};

// choose picks among the roles that are not done; a role then goes on until it has to wait. Fails if all wait.
template <class Cta>
void play(const std::vector<Cta*>& ctas, const std::function<size_t(size_t)>& choose) {
  std::vector<Role*> open;
  for (Cta* cta : ctas) {
    for (Role& r : cta->roles()) open.push_back(&r);
  }
  size_t tries_without_progress = 0;
  while (!open.empty()) {
    const size_t at = choose(open.size());
    Role& r = *open[at];
    const size_t before = r.next;
    while (!r.is_done() && r.steps[r.next]()) ++r.next;
    tries_without_progress = r.next == before ? tries_without_progress + 1 : 0;
    REQUIRE_MESSAGE(tries_without_progress < 2000 + 50 * open.size(),
                    "every role waits; the first is " << open[0]->name);
    if (r.is_done()) open.erase(open.begin() + static_cast<std::ptrdiff_t>(at));
  }
}

// Each order with new CTAs, made by `make`.
template <class Cta, class Make>
void play_orders(std::mt19937& random, const Make& make) {
  size_t turn = 0;
  make([&](const std::vector<Cta*>& ctas) { play(ctas, [&](size_t n) { return random() % n; }); });
  // The first role as far as it gets, then the next: the loader far ahead; and the other way round: everyone waiting for it.
  make([&](const std::vector<Cta*>& ctas) { play(ctas, [&](size_t n) { return turn++ % n; }); });
  make([&](const std::vector<Cta*>& ctas) { play(ctas, [&](size_t n) { return n - 1 - turn++ % n; }); });
}

}  // namespace played
