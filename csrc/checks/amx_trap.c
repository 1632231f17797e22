/* AMX for processors that have none: a library to preload, which carries out AMX instructions when they trap.

It runs the machine code that compilers make of csrc/cpu/tiles.h, one signal per instruction. What the manual says of
the tile configuration is checked: a wrong one ends the process. See Intel's Software Developer's Manual, volume 2. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

static __thread struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} config;
static __thread uint8_t tiles[8][16][64];

static void stop(const char* why) {
    ssize_t ignored = write(2, why, strlen(why));
    (void)ignored;
    _exit(99);
}

static int usable(int tile) {
    return tile < 8 && config.palette == 1 && config.rows[tile] > 0 && config.rows[tile] <= 16 &&
           config.bytes_per_row[tile] > 0 && config.bytes_per_row[tile] <= 64;
}

static float widened(uint16_t x) {
    uint32_t bits = (x & 0x7f80) == 0 ? 0 : (uint32_t)x << 16; /* subnormal numbers count as 0 */
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static void multiply(int c, int a, int b) {
    if (!usable(c) || !usable(a) || !usable(b) || config.bytes_per_row[a] / 4 != config.rows[b] ||
        config.rows[a] != config.rows[c] || config.bytes_per_row[b] != config.bytes_per_row[c] || a == b || a == c ||
        b == c)
        stop("tdpbf16ps: tiles do not fit each other\n");
    for (int m = 0; m < config.rows[c]; ++m)
        for (int k = 0; k < config.rows[b]; ++k)
            for (int n = 0; n < config.bytes_per_row[c] / 4; ++n) {
                uint16_t left[2], right[2];
                float sum;
                memcpy(left, &tiles[a][m][4 * k], sizeof left);
                memcpy(right, &tiles[b][k][4 * n], sizeof right);
                memcpy(&sum, &tiles[c][m][4 * n], sizeof sum);
                sum += widened(left[0]) * widened(right[0]) + widened(left[1]) * widened(right[1]);
                memcpy(&tiles[c][m][4 * n], &sum, sizeof sum);
            }
}

static const int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

/* Address and stride of a memory operand; returns the length of ModRM, SIB and displacement. */
static int operand(const uint8_t* code, const greg_t* registers, int rex_x, int rex_b, uint8_t** address,
                   int64_t* stride) {
    const int mode = code[0] >> 6, rm = code[0] & 7;
    int length = 1, base = rm | rex_b << 3;
    int64_t at = 0;
    *stride = 0;
    if (rm == 4) {
        const int index = (code[1] >> 3 & 7) | rex_x << 3;
        if (index != 4) *stride = (int64_t)((uint64_t)registers[kRegisters[index]] << (code[1] >> 6));
        base = (code[1] & 7) | rex_b << 3;
        length = 2;
    }
    const int no_base = mode == 0 && (base & 7) == 5;
    if (!no_base) at = registers[kRegisters[base]];
    if (mode == 1) {
        at += (int8_t)code[length];
        length += 1;
    } else if (mode == 2 || no_base) {
        int32_t displacement;
        memcpy(&displacement, code + length, sizeof displacement);
        at += displacement;
        length += 4;
    }
    if (no_base && rm == 5) at += (int64_t)(intptr_t)(code + length); /* after the instruction */
    *address = (uint8_t*)(intptr_t)at;
    return length;
}

static void carry_out(int signal_number, siginfo_t* info, void* context) {
    (void)info;
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    const uint8_t* code = (const uint8_t*)(intptr_t)registers[REG_RIP];
    const int prefix = code[2] & 3, opcode = code[3], reg = code[4] >> 3 & 7, rm = code[4] & 7;
    const int in_registers = code[4] >> 6 == 3;
    if (code[0] != 0xc4 || (code[1] & 31) != 2 || (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c)) {
        signal(signal_number, SIG_DFL); /* something else: let it be seen */
        return;
    }
    int length = 1;
    uint8_t* address = 0;
    int64_t stride = 0;
    if (!in_registers) length = operand(code + 4, registers, !(code[1] & 0x40), !(code[1] & 0x20), &address, &stride);
    if (opcode == 0x49 && in_registers && prefix == 0) { /* tilerelease */
        memset(&config, 0, sizeof config);
        memset(tiles, 0, sizeof tiles);
    } else if (opcode == 0x49 && in_registers) { /* tilezero */
        if (prefix != 3 || !usable(reg)) stop("tilezero: tile not configured\n");
        memset(tiles[reg], 0, sizeof tiles[reg]);
    } else if (opcode == 0x49 && prefix == 0) { /* ldtilecfg */
        memcpy(&config, address, sizeof config);
        memset(tiles, 0, sizeof tiles);
        for (int i = 0; i < 16; ++i)
            if (i < 8 ? !usable(i) : config.rows[i] || config.bytes_per_row[i])
                stop("ldtilecfg: not a configuration of eight tiles\n");
    } else if (opcode == 0x4b && !in_registers) {
        if (!usable(reg)) stop("tile not configured\n");
        if (prefix != 2) memset(tiles[reg], 0, sizeof tiles[reg]);
        for (int i = 0; i < config.rows[reg]; ++i)
            if (prefix == 2) /* tilestored */
                memcpy(address + i * stride, tiles[reg][i], config.bytes_per_row[reg]);
            else memcpy(tiles[reg][i], address + i * stride, config.bytes_per_row[reg]);
    } else if (opcode == 0x5c && in_registers && prefix == 2) {
        multiply(reg, rm, ~code[2] >> 3 & 15);
    } else {
        stop("an AMX instruction that is not known here\n");
    }
    registers[REG_RIP] += 4 + length;
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = carry_out;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, 0);
}
