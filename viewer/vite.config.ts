import { defineConfig } from "vite";

export default defineConfig({
  base: "./",
  build: {
    outDir: "../jobs/bundle",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    cssCodeSplit: false,
    modulePreload: false,
    rollupOptions: {
      output: { entryFileNames: "viewer.js", assetFileNames: "viewer[extname]", codeSplitting: false },
    },
  },
});
