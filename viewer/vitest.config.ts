import { defineConfig } from "vitest/config";

// Browsers and their pages share two cores with the tests: one file after the other.
export default defineConfig({
  test: { include: ["tests/*.test.ts"], fileParallelism: false, testTimeout: 60_000, hookTimeout: 240_000 },
});
