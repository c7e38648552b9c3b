/* raii.cpp -- a program of its own that wraps dsv3.h for C++17: what owns memory owns it by a unique_ptr, what is moved is
 * moved, and an error is an exception whose what() is dsv3_error_text.
 *
 * The structs of dsv3.h hold no pointers to themselves, so a move copies the struct and hands over the memory. What was
 * moved from is left zeroed: to use it is an error, and no crash. The demo model `micro` writes 40 bytes four times: by
 * dsv3_forward with a cache, and by dsv3_generate_step with a draft in each step, each once with everything at its place
 * and once with every object moved between the steps. All four texts must be the same.
 *
 * Build:  c++ -std=c++17 raii.cpp $(pkg-config --cflags --libs dsv3) -o raii     or with CMake: cmake/CMakeLists.txt
 */
#ifndef RAII_WITH_LIBRARY /* the compiled library brings the implementation of dsv3.h; companions are headers always */
#define DSV3_IMPLEMENTATION
#endif
#define CHECKPOINT_IMPLEMENTATION /* its header comes before any other */
#include <dsv3/checkpoint.h>

#include <dsv3.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace raii {

class error : public std::runtime_error {
  public:
    explicit error(const dsv3_error &e) : std::runtime_error(text(e)), code(e.code) {}
    dsv3_result code;

  private:
    static std::string text(const dsv3_error &e) {
        char line[256];
        return dsv3_error_text(&e, line, sizeof line);
    }
};

/* call(f, a, b) is f(a, b, &error): all functions that can fail take the error last. */
template <class... Parameters, class... Arguments>
void call(dsv3_result (*function)(Parameters...), Arguments &&...arguments) {
    dsv3_error e;
    if (function(std::forward<Arguments>(arguments)..., &e) != DSV3_OK) throw error(e);
}

/* A struct of dsv3.h and the memory that it lives on. Derived classes fill both; this one knows how to move them. */
template <class Struct> class owner {
  public:
    owner(owner &&from) noexcept
        : value(std::exchange(from.value, Struct{})), memory(std::exchange(from.memory, nullptr)) {}
    owner &operator=(owner &&from) noexcept {
        value = std::exchange(from.value, Struct{});
        memory = std::exchange(from.memory, nullptr);
        return *this;
    }
    Struct *get() { return &value; }
    const Struct *operator->() const { return &value; }
    Struct *operator->() { return &value; }

  protected:
    owner() = default;
    void *allocate(std::size_t bytes) { /* new aligns as malloc does */
        memory.reset(new unsigned char[bytes]);
        return memory.get();
    }

  private:
    Struct value{};
    std::unique_ptr<unsigned char[]> memory;
};

/* Owns nothing, and may be copied. */
class context {
  public:
    explicit context(dsv3_backend backend = DSV3_BACKEND_AUTO, std::size_t threads = 0) {
        call(dsv3_context_init, &value, backend, threads);
        value.attention =
            DSV3_ATTENTION_ABSORBED; /* fixed: then bits do not depend on how a text is cut into calls */
    }
    const dsv3_context *get() const { return &value; }
    std::size_t threads() const { return value.threads; }

  private:
    dsv3_context value;
};

/* On the heap, since checkpoint.h does not say that an open one may be moved. */
class checkpoint {
  public:
    explicit checkpoint(const std::string &directory) : value(new ::checkpoint{}) {
        st_error e;
        if (checkpoint_open(value.get(), directory.c_str(), &e) != ST_OK) throw std::runtime_error(e.message);
    }
    const dsv3_config *config() const { return &value->config; }
    const dsv3_model *model() const { return &value->model; }
    std::size_t vocabulary() const { return static_cast<std::size_t>(value->config.vocab_size); }

  private:
    struct close {
        void operator()(::checkpoint *c) const {
            checkpoint_close(c);
            delete c;
        }
    };
    std::unique_ptr<::checkpoint, close> value;
};

class cache : public owner<dsv3_cache> {
  public:
    cache(const dsv3_config *config, std::size_t capacity, dsv3_type type = DSV3_F32) {
        std::size_t bytes;
        call(dsv3_cache_size, config, capacity, type, &bytes);
        call(dsv3_cache_init, config, get(), capacity, type, allocate(bytes), bytes);
    }
};

class workspace : public owner<dsv3_workspace> {
  public:
    workspace(const dsv3_config *config, std::size_t rows, std::size_t threads) {
        std::size_t bytes;
        call(dsv3_workspace_size, config, rows, threads, &bytes);
        call(dsv3_workspace_init, config, get(), rows, threads, allocate(bytes), bytes);
    }
};

class sequence : public owner<dsv3_sequence> {
  public:
    sequence(const dsv3_model *model, std::size_t capacity, std::size_t rows, std::size_t drafts) {
        std::size_t bytes;
        call(dsv3_sequence_size, model, capacity, DSV3_F32, rows, drafts, &bytes);
        call(dsv3_sequence_init, model, get(), capacity, DSV3_F32, rows, drafts, allocate(bytes), bytes);
    }
    /* The prompt must stay where it is until it is read: a vector that is moved leaves its numbers in place. */
    void append(const dsv3_model *model, std::vector<int32_t> tokens) {
        call(dsv3_sequence_append, model, get(), tokens.data(), tokens.size());
        prompt = std::move(tokens);
    }
    std::size_t length() const { return dsv3_sequence_length(operator->()); }

  private:
    std::vector<int32_t> prompt;
};

} // namespace raii

static_assert(std::is_nothrow_move_constructible_v<raii::sequence> && !std::is_copy_constructible_v<raii::sequence>,
              "a sequence is moved, never copied");
static_assert(std::is_nothrow_move_assignable_v<raii::cache> && std::is_nothrow_move_assignable_v<raii::checkpoint>,
              "and so is all that owns memory");

static const std::size_t WRITE = 40;
static const std::vector<int32_t> prompt = {'M', 'y', ' ', 'd', 'e', 'a', 'r', ' '};

/* Everything goes to another address, and back into the variable that the caller knows. */
template <class T> static void move_around(T &object) {
    std::vector<T> shelf;
    shelf.push_back(std::move(object));
    shelf.reserve(shelf.capacity() + 1); /* and once more */
    object = std::move(shelf.front());
}

/* Greedy text, token by token. */
static std::string write_with_cache(const raii::context &context, raii::checkpoint &model, bool moving) {
    raii::cache cache(model.config(), prompt.size() + WRITE);
    raii::workspace work(model.config(), prompt.size(), context.threads());
    std::vector<float> logits(model.vocabulary());
    std::vector<int32_t> input = prompt;
    std::string text;
    while (text.size() < WRITE) {
        dsv3_batch batch = {input.size(), input.data(), nullptr, nullptr, 1, nullptr};
        int32_t token;
        raii::call(dsv3_forward, context.get(), logits.data(), model.model(), cache.get(), std::size_t{1}, &batch,
                   work.get());
        raii::call(dsv3_sample, &token, logits.data(), logits.size(), 0.0f, 1.0f, nullptr, nullptr);
        text += static_cast<char>(token);
        input.assign(1, token);
        if (moving) {
            move_around(cache);
            move_around(work);
            move_around(model);
        }
    }
    return text;
}

/* The same with the model's MTP module drafting a token in each step. */
static std::string write_with_sequence(const raii::context &context, raii::checkpoint &model, bool moving) {
    const std::size_t rows = 3,
                      drafts = 1; /* rows: fewer than the prompt has, so that objects move while it is read */
    raii::workspace work(model.config(), rows, context.threads());
    raii::sequence sequence(model.model(), prompt.size() + WRITE, rows, drafts);
    std::vector<float> logits((drafts + 1) * model.vocabulary());
    std::string text;
    sequence.append(model.model(), prompt);
    sequence->limit = prompt.size() + WRITE;
    while (sequence.length() < prompt.size() + WRITE) {
        dsv3_sequence *list = sequence.get();
        raii::call(dsv3_generate_step, context.get(), logits.data(), model.model(), &list, std::size_t{1},
                   work.get());
        for (std::size_t i = 0; i < sequence->n_token; i++) text += static_cast<char>(sequence->token[i]);
        if (moving) {
            move_around(sequence);
            move_around(work);
            move_around(model);
        }
    }
    std::printf("  %d bytes in %d steps\n", static_cast<int>(text.size()), static_cast<int>(sequence->steps));
    return text;
}

/* The mistake must throw, with this code and in these words. */
template <class Mistake> static bool throws(dsv3_result code, const char *says, Mistake mistake) {
    try {
        mistake();
    } catch (const raii::error &e) {
        std::printf("  %s\n", e.what());
        return e.code == code && std::strstr(e.what(), says) != nullptr;
    }
    return false;
}

static bool mistakes(const raii::context &context, const raii::checkpoint &model) {
    raii::sequence sequence(model.model(), 8, 4, 0), other = std::move(sequence);
    raii::workspace work(model.config(), 4, context.threads());
    std::vector<float> logits(model.vocabulary());
    other.append(model.model(), {'A'});
    return throws(DSV3_ERR_TOKEN, "found 300",
                  [&] { raii::sequence(model.model(), 8, 4, 0).append(model.model(), {300}); }) &&
           throws(DSV3_ERR_ARG, "rows", [&] { raii::workspace(model.config(), 0, 1); }) &&
           throws(DSV3_ERR_ARG, "sequences[0]", [&] { /* what was moved from is no sequence */
                                                           dsv3_sequence *list = sequence.get();
                                                           raii::call(dsv3_generate_step, context.get(),
                                                                      logits.data(), model.model(), &list,
                                                                      std::size_t{1}, work.get());
           });
}

int main(int argc, char **argv) {
    try {
        const raii::context context;
        raii::checkpoint model(std::string(argc > 1 ? argv[1] : ".") + "/examples/models/micro");
        const std::string text = write_with_cache(context, model, false);
        std::printf("  My dear %s\n", text.c_str());
        if (text.size() != WRITE || write_with_cache(context, model, true) != text ||
            write_with_sequence(context, model, false) != text || write_with_sequence(context, model, true) != text) {
            std::printf("raii: the texts differ\n");
            return 1;
        }
        if (!mistakes(context, model)) {
            std::printf("raii: a mistake was not named\n");
            return 1;
        }
    } catch (const std::exception &e) {
        std::printf("raii: %s\n", e.what());
        return 1;
    }
    std::printf("raii: ok\n");
    return 0;
}
