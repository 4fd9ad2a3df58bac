import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium, type Browser, type BrowserContextOptions, type Page } from "playwright-core";
import { afterAll, beforeAll, expect } from "vitest";
import { serve, type Site } from "./server";

const ROOT = join(import.meta.dirname, "..", "..");
export const BUNDLE = join(ROOT, "jobs", "bundle");
const PLACES = ["chromium", "chromium-browser", "google-chrome"].map((name) => `/usr/bin/${name}`);
export const CHROMIUM = [process.env["CHROMIUM"] ?? "", ...PLACES].find((place) => place && existsSync(place));
if (!CHROMIUM) console.warn("Tests in a browser are skipped: there is no Chromium (apt-get install chromium, or CHROMIUM=path).");

/** A site that tests/sites.py writes, in a folder that is deleted after the tests. */
export function makeSite(...options: string[]): string {
  const folder = mkdtempSync(join(tmpdir(), "viewer-site-"));
  const python = process.env["PYTHON"] ?? join(ROOT, ".venv", "bin", "python");
  execFileSync(python, ["-m", "tests.sites", folder, ...options], { cwd: ROOT, stdio: ["ignore", "ignore", "inherit"] });
  return folder;
}

export interface Visit {
  page: Page;
  /** What the console said of errors, and requests that left the host. */
  faults: string[];
}

export interface Bench {
  site: Site;
  open: (hash: string, options?: BrowserContextOptions) => Promise<Visit>;
}

/** A browser and a server of one site for the tests of a file; use it within describe. */
export function bench(...options: string[]): Bench {
  const made: { browser?: Browser; folder?: string } = {};
  const self = {} as Bench;
  beforeAll(async () => {
    made.folder = makeSite(...options);
    self.site = await serve(BUNDLE, made.folder);
    made.browser = await chromium.launch({ executablePath: CHROMIUM ?? "", args: ["--no-sandbox"] });
  });
  afterAll(async () => {
    await made.browser?.close();
    await self.site?.close();
    if (made.folder) rmSync(made.folder, { recursive: true });
  });
  self.open = async (hash, contextOptions = {}) => {
    if (!made.browser) throw new Error("the browser has not been started");
    self.site.answer = () => false;
    const context = await made.browser.newContext({ viewport: { width: 1280, height: 860 }, ...contextOptions });
    const page = await context.newPage();
    const faults: string[] = [];
    page.on("console", (message) => message.type() === "error" && faults.push(message.text()));
    page.on("pageerror", (error) => faults.push(error.message));
    page.on("request", (request) => !request.url().startsWith(self.site.url) && faults.push(request.url()));
    await page.goto(self.site.url + hash);
    return { page, faults };
  };
  return self;
}

/** Ends a visit in which nothing may have gone wrong. */
export async function leave({ page, faults }: Visit): Promise<void> {
  await page.context().close();
  expect(faults).toEqual([]);
}
